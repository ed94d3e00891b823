"""Methods side by side: the same teacher, the same cost, the same seeds, one generated table.

    python -m sim_jax.table --config=configs/digits.py --steps=500 --seeds=0,1,2 --workdir=runs/digits_table --out=configs/digits_table.md

A row is one set of words of the config, by default those of its `TABLE`. Every row gets the flops that --steps iterations of the first
row take, as XLA counts them, so that a method that needs more per iteration makes fewer; its schedules end with its last iteration, and
its final images are measured as the final report does. Finished (row, seed) pairs are kept in the workdir: the same command goes on
where it stopped.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import math
import pathlib
import statistics
import sys
import time
from typing import Any

from sim_jax import cli

_FIGURES = ("fd", "class_agreement", "precision", "recall")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sim_jax.table", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a config file with words, such as configs/digits.py")
    parser.add_argument("--rows", help="words of each row, separated by blanks, such as 'sim sid dmd2,gan'; default: the config's TABLE")
    parser.add_argument("--steps", type=int, default=500, help="iterations of the first row (default %(default)s)")
    parser.add_argument("--seeds", default="0,1,2", help="(default %(default)s)")
    parser.add_argument("--part", default="0/1", help="I/N: every N-th row from the I-th, for several processes on one workdir")
    parser.add_argument("--workdir", required=True, help="results are kept here")
    parser.add_argument("--out", required=True, help="the table, Markdown")
    return parser


@dataclasses.dataclass(frozen=True)
class _Row:
    """One set of words, its experiment, the flops of an iteration and how many iterations it makes."""

    words: str
    experiment: Any
    flops: float
    steps: int


def _build(config: str, words: str, steps: int):
    """The row's experiment with a run of `steps` iterations: what is annealed has to arrive."""
    from sim_jax import config_file
    from sim_jax import experiment as experiments

    row = config_file.load(f"{config}:{words}")
    with row.unlocked():
        row.total_kimg = steps / row.fake_score.updates * row.batch_size / 1000
    return experiments.build(row)


def _counted(workdir: pathlib.Path, part: int, words: str, count) -> float:
    """`count()`, the flops of an iteration of a row: compiled once, then read from the workdir."""
    path = workdir / f"flops{part}.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    if words not in known:
        known[words] = count()
        path.write_text(json.dumps(known))
    return known[words]


def _check(args: argparse.Namespace) -> tuple[list[str], list[int], tuple[int, int]]:
    """(rows, seeds, part). Raises ValueError."""
    from sim_jax import config_file

    rows = args.rows.split() if args.rows else list(config_file.load_module(args.config).TABLE)
    try:
        seeds, (part, parts) = [int(s) for s in args.seeds.split(",")], map(int, args.part.split("/"))
    except ValueError:
        raise ValueError(f"--seeds, --part: got {args.seeds!r}, {args.part!r}, allowed: whole numbers such as 0,1,2 and I/N") from None
    if not rows or args.steps < 1 or not 0 <= part < parts or any(s < 0 for s in seeds):
        raise ValueError("--rows, --steps, --seeds, --part: allowed: one row or more, 1 step or more, seeds from 0, I below N")
    return rows, seeds, (part, parts)


def _flops(experiment) -> float:
    """Of one iteration, averaged over a generator's turn."""
    from sim_jax import dispatch, planning

    step_fn, cycle = dispatch.make_step(experiment), experiment.cycle
    turns = collections.Counter(tuple(turn.items()) for turn in cycle)
    total = 0.0
    for turn, count in turns.items():
        compiled = step_fn.lower(*planning.arguments(experiment), **dict(turn)).compile()
        total += count * compiled.cost_analysis()["flops"]
    return total * experiment.layout.mesh.size / len(cycle)


def _train(row: _Row, step_fn, seed: int, workdir: pathlib.Path, bar) -> tuple[Any, float]:
    """The generator's average after the row's iterations, and the seconds that they took without the first."""
    import jax

    from sim_jax import experiment as experiments
    from sim_jax import sharding, train

    config = row.experiment.config.copy_and_resolve_references()
    with config.unlocked():
        config.seed = seed
    experiment = dataclasses.replace(row.experiment, config=config)
    state = experiments.initial_state(experiment)
    teacher = sharding.place(experiment.teacher.params, experiment.teacher_shardings)
    drawn = train.draw_pairs(row.experiment, workdir, teacher, bar)
    batches, key, begin = train.make_batches(experiment, 0, drawn), jax.random.key(seed), None
    for step in range(row.steps):
        state, metrics = step_fn(state, teacher, key, next(batches), **experiment.turns(step))
        jax.block_until_ready(metrics)
        begin = begin or time.monotonic()
        bar.update(step + 1, {})
    broken = [name for name, value in metrics.items() if not math.isfinite(float(value))]
    if broken:
        raise FloatingPointError(f"{row.words} seed {seed}: {broken[0]} is not finite after {row.steps} iterations")
    return next(iter(state.generator.ema.values())), (time.monotonic() - begin) * row.steps / max(row.steps - 1, 1)


def _measure(experiment, params) -> dict[str, Any]:
    from sim_jax.data import digits
    from sim_jax.evals import features, quality
    from sim_jax.evals.generate import ImageSampler, SamplerSpec

    config, real = experiment.config, digits.load()
    sampler = ImageSampler(experiment.recipe.generator.network, SamplerSpec(few_step=experiment.recipe.plan), experiment.latents(),
                           layout=experiment.layout, batch_per_device=config.run.batch_per_device)
    pixels, classes = sampler(params, seed=1, count=config.run.eval_images)
    return quality.quality(pixels, classes, real_images=real.images, real_labels=real.labels, features=features.digits_features(),
                           label_scheme=config.labels.scheme)


def _results(workdir: pathlib.Path) -> dict[tuple[str, int], dict[str, Any]]:
    """What is finished, by (words, seed)."""
    rows = [json.loads(line) for path in sorted(workdir.glob("results*.jsonl")) for line in path.read_text().splitlines()]
    return {(row["words"], row["seed"]): row for row in rows}


def table(results: dict[tuple[str, int], dict[str, Any]], rows: list[str], *, command: str, device: str, teacher: dict[str, Any] | None
          ) -> str:
    """The Markdown page."""
    first = results[rows[0], min(seed for words, seed in results if words == rows[0])]
    lines = [
        "# The family at equal cost", "", "Generated, do not edit:", "", "```bash", command, "```", "",
        f"Every row has the flops of {first['steps']} iterations of `{rows[0]}` ({first['steps'] * first['flops'] / 1e12:.2f} Tflop), mean and "
        f"sample standard deviation over seeds; {first['count']} images against {first['reference_count']} real ones, features "
        f"`{first['features']}`. Seconds are those of the iterations alone, without compiling. Measured on {device}.", "",
        "| words | calls | iterations | Mflop an image | seconds | Frechet distance | class agreement | precision | recall |",
        "|---|---|---|---|---|---|---|---|---|"]
    for words in rows:
        runs = [run for (name, _), run in sorted(results.items()) if name == words]
        if runs:
            spread = f" ± {statistics.stdev(run['fd'] for run in runs):.3f}" if len(runs) > 1 else ""
            mean = {key: statistics.mean(run[key] for run in runs) for key in (*_FIGURES, "seconds")}
            one = runs[0]
            lines.append(f"| `{words}` | {one['calls']} | {one['steps']} | {one['flops'] / one['batch_size'] / 1e6:.1f} | {mean['seconds']:.0f} "
                         f"| {mean['fd']:.3f}{spread} | {mean['class_agreement']:.1%} | {mean['precision']:.2f} | {mean['recall']:.2f} |")
    if teacher is not None:
        lines.append(f"| teacher | {teacher['calls']} | | | | {teacher['fd']:.3f} | {teacher['class_agreement']:.1%} | {teacher['precision']:.2f} | "
                     f"{teacher['recall']:.2f} |")
    floor = statistics.mean(run["noise_floor"] for run in results.values())
    return "\n".join([*lines, "", f"{first['count']} perfect samples would show about {floor:.3f}.", ""])


def run(args: argparse.Namespace, command: str) -> int:
    rows, seeds, (part, parts) = _check(args)
    from sim_jax import dispatch, files, train
    from sim_jax.progress import ProgressBar

    workdir = files.make_folder(args.workdir)
    cli.use_compilation_cache()
    budget, done = None, _results(workdir)
    todo = {words: [seed for seed in seeds if (words, seed) not in done] for i, words in enumerate(rows) if i % parts == part}
    for words in (rows if any(todo.values()) else ()):
        if budget is not None and not todo.get(words):
            continue
        flops = _counted(workdir, part, words, lambda: _flops(_build(args.config, words, args.steps)))
        budget = budget or flops * args.steps
        if not todo.get(words):
            continue
        steps = max(round(budget / flops), 1)
        row = _Row(words, _build(args.config, words, steps), flops, steps)
        step_fn = dispatch.make_step(row.experiment)
        for seed in todo.get(words, ()):
            bar = ProgressBar(row.steps, description=f"{words} seed {seed}", images_per_step=row.experiment.config.batch_size)
            params, seconds = _train(row, step_fn, seed, files.make_folder(workdir / f"{words}"), bar)
            bar.close()
            figures = _measure(row.experiment, params)
            result = {"words": words, "seed": seed, "steps": row.steps, "flops": flops, "seconds": seconds,
                      "calls": len(row.experiment.recipe.plan.sigmas), "batch_size": row.experiment.config.batch_size, **figures}
            with open(workdir / f"results{part}.jsonl", "a") as file:
                file.write(json.dumps(result) + "\n")
            print(f"{words} seed {seed}: Frechet distance {figures['fd']:.3f}", flush=True)
    done = _results(workdir)
    missing = [f"{words} seed {seed}" for words in rows for seed in seeds if (words, seed) not in done]
    if missing:
        print(f"{len(missing)} still to do, among them {missing[0]}", flush=True)
        return 0
    teacher = workdir / "teacher.json"
    if not teacher.is_file():
        teacher.write_text(json.dumps(_teacher(_build(args.config, rows[0], args.steps))))
    page = table(done, rows, command=command, device=train.device_name(), teacher=json.loads(teacher.read_text()))
    files.write_atomically(args.out, lambda file: file.write(page.encode()))
    print(f"{len(rows)} rows of {len(seeds)} seeds: {args.out}")
    return 0


def _teacher(experiment) -> dict[str, Any]:
    """The teacher's own figures, in the calls that the config gives it."""
    import jax

    from sim_jax import sharding
    from sim_jax.data import digits
    from sim_jax.evals import features, quality
    from sim_jax.evals.generate import ImageSampler

    real, spec = digits.load(), experiment.teacher_sampler()
    sampler = ImageSampler(experiment.recipe.teacher, spec, experiment.latents(), layout=experiment.layout, batch_per_device=500)
    params = jax.tree.map(lambda p: p, sharding.place(experiment.teacher.params, experiment.teacher_shardings))
    pixels, classes = sampler(params, seed=1, count=experiment.config.run.eval_images)
    return {"calls": spec.calls, **quality.quality(pixels, classes, real_images=real.images, real_labels=real.labels,
                                                   features=features.digits_features(), label_scheme=experiment.config.labels.scheme)}


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    command = cli.command_line("sim_jax.table", ["sim_jax.table", *(sys.argv[1:] if argv is None else argv)])
    return cli.guard(lambda: run(args, command))


if __name__ == "__main__":
    sys.exit(main())
