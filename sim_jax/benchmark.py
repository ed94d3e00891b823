"""How fast a config's iteration is on the hardware at hand, and how near that is to what the hardware can do.

    python -m sim_jax.benchmark --config=configs/cifar10.py --config.batch_size=128
    python -m sim_jax.benchmark --config=configs/imagenet64.py:dmd2 --config.batch_size=40 --out=now.json --compare=before.json --profile=trace

Every program of an iteration is timed by itself (a config whose critic moves more often has two), on random weights and random images
unless the config names a teacher: milliseconds are the median over rounds with the fastest and slowest, images a second those of the
whole cycle of turns. Model flops are counted from the shapes (`cost.py`), with the zeros around an image as published figures do. XLA / model
is XLA's count of the compiled program over the same products without those zeros: more than 1 is work that the mathematics does not ask for,
such as recomputation. Utilisation is model flops a second over the device's peak in the type that the generator computes in. Compile times
are taken with an empty persistent cache and again with the filled one.

--loop=N also runs N iterations of the training loop itself and says what it adds to a step; --input reads the config's images alone.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from sim_jax import cli


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sim_jax.benchmark", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--config", required=True, help="a config file with its words, such as configs/cifar10.py:cond; then --config.KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=5, help="times that each program is timed (default %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="iterations of a round, dispatched without waiting (default %(default)s)")
    parser.add_argument("--loop", type=int, default=0, metavar="N", help="time N iterations of the training loop too (20 or more)")
    parser.add_argument("--input", action="store_true", help="time reading the config's images too (needs data.name)")
    parser.add_argument("--out", help="the result, JSON")
    parser.add_argument("--compare", help="an earlier --out; its ratios are printed")
    parser.add_argument("--profile", metavar="FOLDER", help="write a trace of three iterations, for TensorBoard or Perfetto")
    return parser


def _load(args: argparse.Namespace, overrides: list[str]):
    """The checked config, random where it leaves weights open. Raises ValueError."""
    from sim_jax import checkpoint, config_file

    if args.rounds < 1 or args.steps < 1 or args.loop < 0 or 0 < args.loop < 20:
        raise ValueError(f"--rounds, --steps, --loop: got {args.rounds}, {args.steps}, {args.loop}, allowed: 1 or more; a loop of 20 or more")
    earlier = checkpoint.read_json(args.compare) if args.compare else None
    if earlier is not None and "programs" not in earlier:
        raise ValueError(f"--compare: {args.compare} is no result of sim_jax.benchmark")
    config = config_file.load(args.config)
    config_file.override(config, overrides)
    if config.method != "dsm" and not config.teacher.path:
        config.teacher.path = "random:0"
    return config, earlier


def _batch(experiment) -> dict[str, Any] | None:
    """Random rows of whatever the iteration takes."""
    import jax
    import numpy as np

    from sim_jax import planning

    rng, label_dim = np.random.default_rng(0), experiment.recipe.label_dim
    draw = {"image": lambda shape: rng.uniform(-1, 1, shape), "label": lambda shape: rng.integers(0, max(label_dim, 1), shape),
            "index": lambda shape: np.arange(*shape), "text": lambda shape: rng.standard_normal(shape, "float32"), "text_mask": np.ones}
    *_, batch = planning.arguments(experiment)
    return jax.tree_util.tree_map_with_path(
        lambda path, rows: jax.device_put(draw[path[-1].key](rows.shape).astype(rows.dtype), rows.sharding), batch)


def _programs(experiment) -> dict[str, tuple[dict[str, bool], int]]:
    """{name: (turns, times in a cycle)} of the iteration's different programs."""
    from sim_jax import planning

    cycle = experiment.cycle
    return {planning.title(turn): (turn, cycle.count(turn)) for turn in cycle}


def _compile(experiment, step_fn, arguments, turn) -> tuple[Any, dict[str, float]]:
    """The compiled program, and seconds of tracing and of compiling with an empty and with the filled persistent cache."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        _forget_cache()
        seconds = {}
        for name in ("cold", "warm"):
            jax.clear_caches()
            begin = time.perf_counter()
            lowered = step_fn.lower(*arguments, **turn)
            seconds["trace"] = time.perf_counter() - begin
            begin = time.perf_counter()
            compiled = lowered.compile()
            seconds[name] = time.perf_counter() - begin
        jax.config.update("jax_compilation_cache_dir", None)
        _forget_cache()
    return compiled, seconds


def _forget_cache() -> None:
    from jax.experimental.compilation_cache import compilation_cache

    compilation_cache.reset_cache()


def _time(compiled, state, arguments, *, rounds: int, steps: int) -> tuple[list[float], Any]:
    """Seconds an iteration, once a round; the state that the iterations leave."""
    import jax

    wait = jax.default_backend() == "cpu"  # programs that queue up on fake devices deadlock
    out = []
    for _ in range(rounds):
        begin = time.perf_counter()
        for _ in range(steps):
            state, metrics = compiled(state, *arguments)
            if wait:
                jax.block_until_ready(metrics)
        jax.block_until_ready((state, metrics))
        out.append((time.perf_counter() - begin) / steps)
    return out, state


def _memory(compiled) -> dict[str, int]:
    """Bytes on a device, as the compiler plans them and as the device has seen them."""
    import jax

    from sim_jax import programs

    out = programs.memory(compiled)
    out["planned"] = out.pop("peak")
    seen = jax.local_devices()[0].memory_stats() or {}
    return out | ({"peak": seen["peak_bytes_in_use"]} if "peak_bytes_in_use" in seen else {})


def _measure(args: argparse.Namespace, experiment, began: float) -> dict[str, Any]:
    """Every program's figures."""
    import jax

    from sim_jax import cost, devices, dispatch, sharding
    from sim_jax import experiment as experiments

    recipe, config = experiment.recipe, experiment.config
    state, step_fn, batch = experiments.initial_state(experiment), dispatch.make_step(experiment), _batch(experiment)
    teacher = None if experiment.teacher is None else sharding.place(experiment.teacher.params, experiment.teacher_shardings)
    made, forward = cost.updates(recipe), cost.passes(experiment.trained.network).forward
    without_padding = cost.updates(recipe, padding=False)
    count, dtype = jax.device_count(), str(config.generator.dtype if experiment.distils else config.fake_score.dtype)
    peak = devices.peak_flops(jax.devices()[0].device_kind, dtype, config.precision)
    programs, prepared = {}, time.perf_counter() - began
    for name, (turn, times) in _programs(experiment).items():
        print(f"compiling {name!r}, twice", flush=True)
        arguments = (teacher, jax.random.key(1), batch)
        compiled, seconds = _compile(experiment, step_fn, (state, *arguments), turn)
        _, state = _time(compiled, state, arguments, rounds=1, steps=2)
        if args.profile:
            with jax.profiler.trace(str(pathlib.Path(args.profile) / name.replace(" ", ""))):
                _, state = _time(compiled, state, arguments, rounds=1, steps=3)
        taken, state = _time(compiled, state, arguments, rounds=args.rounds, steps=args.steps)
        median, analysis = statistics.median(taken), compiled.cost_analysis() or {}
        flops = cost.iteration_flops(recipe, made, **turn) * config.batch_size
        xla = analysis["flops"] * count if "flops" in analysis else None
        counted = cost.iteration_flops(recipe, without_padding, **turn) * config.batch_size
        programs[name] = {
            "times_in_a_cycle": times, "seconds": median, "fastest": min(taken), "slowest": max(taken), "model_flops": flops,
            "forward_passes": flops / config.batch_size / forward, "xla_flops": xla, "xla_over_model": xla and xla / counted,
            "flops_per_second": flops / median, "utilisation": peak and flops / median / (peak * count),
            "bytes_accessed": analysis.get("bytes accessed"), "memory": _memory(compiled), "seconds_to_trace": seconds["trace"],
            "seconds_to_compile": {"cold": seconds["cold"], "warm": seconds["warm"]},
            "seconds_to_first_step": {kind: prepared + seconds["trace"] + seconds[kind] + median for kind in ("cold", "warm")}}
    cycle = sum(p["seconds"] * p["times_in_a_cycle"] for p in programs.values())
    images = config.batch_size * sum(p["times_in_a_cycle"] for p in programs.values())
    return {"programs": programs, "images_per_second": images / cycle, "peak_flops": peak, "dtype": dtype, "forward_flops": forward}


def _loop(args: argparse.Namespace, config, programs: Mapping[str, Any]) -> dict[str, float]:
    """What the training loop adds to the steps that it makes, from the images a second that it records."""
    from sim_jax import train

    config = config.copy_and_resolve_references()
    with tempfile.TemporaryDirectory() as folder, config.unlocked():
        config.total_kimg = args.loop / config.fake_score.updates * config.batch_size / 1000
        never = 10 * args.loop
        config.run.update(log_every=max(args.loop // 10, 1), probe_every=never, sample_every=never, save_every=never, eval_every=0,
                          features="none", panel_images=0, grid=4, batch_per_device=4, probe_images=8)
        train.run(config, folder)
        lines = [json.loads(line) for line in (pathlib.Path(folder) / "metrics.jsonl").read_text().splitlines()]
    speeds = [line["images_per_second"] for line in lines if line.get("images_per_second")][1:]
    loop = config.batch_size / statistics.median(speeds)
    total = sum(p["times_in_a_cycle"] for p in programs.values())
    step = sum(p["seconds"] * p["times_in_a_cycle"] for p in programs.values()) / total
    return {"seconds": loop, "overhead": loop / step - 1}


def _input(experiment, step_images: float) -> dict[str, float]:
    """Images a second of the input pipeline alone, onto the devices."""
    import jax

    from sim_jax import train

    batches = train.make_batches(experiment, 0, None)
    for _ in range(3):
        next(batches)
    begin, count = time.perf_counter(), 0
    while count < 20 or time.perf_counter() - begin < 2:
        jax.block_until_ready(next(batches))
        count += 1
    speed = count * experiment.config.batch_size / (time.perf_counter() - begin)
    return {"images_per_second": speed, "over_step": speed / step_images}


def _text(result: Mapping[str, Any], earlier: Mapping[str, Any] | None) -> str:
    """The report for people."""
    lines = [f"{result['config']}  batch {result['batch_size']}, {result['dtype']}, {result['device']}",
             f"{result['images_per_second']:.4g} images/s; forward pass {result['forward_flops'] / 1e9:.4g} Gflop an image"]
    for name, p in result["programs"].items():
        xla = f"{p['xla_over_model']:.3f}" if p["xla_over_model"] else "not counted"
        used = f"{p['utilisation']:.1%} of the peak" if p["utilisation"] else "the device's peak is not known"
        memory = p["memory"].get("peak", p["memory"]["planned"])
        lines += [
            f"{name}: {p['seconds'] * 1e3:.4g} ms ({p['fastest'] * 1e3:.4g} to {p['slowest'] * 1e3:.4g})",
            f"    {p['forward_passes']:.2f} forward passes, {p['model_flops'] / 1e12:.4g} Tflop; XLA / model {xla}",
            f"    {p['flops_per_second'] / 1e12:.4g} Tflop/s, {used}",
            f"    memory {memory / 2**20:.0f} MiB a device; compiling {p['seconds_to_compile']['cold']:.1f} s, cached "
            f"{p['seconds_to_compile']['warm']:.1f} s; first step after {p['seconds_to_first_step']['cold']:.1f} s, cached "
            f"{p['seconds_to_first_step']['warm']:.1f} s"]
        before = earlier and earlier["programs"].get(name)
        if before:
            lines.append(f"    {before['seconds'] / p['seconds']:.3f} times as fast as in the earlier result")
    if "loop" in result:
        lines.append(f"training loop: {result['loop']['seconds'] * 1e3:.4g} ms an iteration, {result['loop']['overhead']:+.1%} beside the step")
    if "input" in result:
        lines.append(f"input: {result['input']['images_per_second']:.4g} images/s, {result['input']['over_step']:.1f} times what the step takes")
    return "\n".join(lines)


def run(args: argparse.Namespace, overrides: list[str], began: float) -> int:
    config, earlier = _load(args, overrides)
    cli.keep_memory()
    cli.split_cpu()
    import jax

    from sim_jax import compiling, files, workdirs
    from sim_jax import experiment as experiments

    compiling.use_precision(config.precision)
    experiment = experiments.build(config, with_data=args.input)
    if args.input and experiment.source is None:
        raise ValueError("--input: got a config without images, allowed: one whose data.name is not 'none'")
    result = {"config": " ".join([args.config, *overrides]), "batch_size": config.batch_size, "device": workdirs.device_name(),
              "devices": jax.device_count(), "versions": workdirs.versions(), **_measure(args, experiment, began)}
    if args.input:
        result["input"] = _input(experiment, result["images_per_second"])
    if args.loop:
        result["loop"] = _loop(args, config, result["programs"])
    if args.out:
        files.write_atomically(args.out, lambda file: file.write(json.dumps(result, indent=1).encode() + b"\n"), key="--out")
    print(_text(result, earlier), flush=True)
    return 0


def _process_began() -> float:
    """`time.perf_counter()` at the start of this process, as well as it can be known."""
    try:
        ticks = int(pathlib.Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        age = 0.0
    return time.perf_counter() - age


def main(argv: list[str] | None = None) -> int:
    args, overrides = _parser().parse_known_args(argv)
    began = _process_began()
    return cli.guard(lambda: run(args, overrides, began))


if __name__ == "__main__":
    sys.exit(main())
