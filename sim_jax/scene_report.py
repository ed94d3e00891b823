"""Measures text-to-image networks on drawn scenes, where adherence to a caption can be read from the pixels.

    python -m sim_jax.scene_report --workdir=runs/scenes --out=scenes.json --grid=scenes.png

Of a generator's run, the generator beside the teacher that it was distilled from, which is guided as it was then; of a teacher's run that
teacher. For each: adherence (count, colour, shape, relation, all) to captions as training has them, and to held-out captions, whose kinds
of shape or pairs of kinds training never saw; the Frechet distance to drawings, and the diversity within a caption. Drawings and the
distance between two halves of them are measured alike, as the yardstick.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import Any

from sim_jax import cli

GRID = ("a red square", "a yellow circle", "two green triangles", "three blue circles", "a red square left of a green triangle",
        "a blue circle above a yellow square", "a green square right of a red circle", "a blue triangle and a red circle",
        "a red square above a blue circle", "a yellow triangle", "three green circles", "a yellow triangle left of a blue square")
VARIED = (*GRID[:8], "a yellow square", "two red circles", "three red triangles", "a blue square below a red triangle")
SAMPLES = 16  # per caption, for diversity


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sim_jax.scene_report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="of a run of configs/scenes.py, sim or teacher")
    parser.add_argument("--num", type=int, default=2000, help="images of each kind (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(default %(default)s)")
    parser.add_argument("--guidance", type=float, help="the teacher's classifier-free guidance weight; default: the run's")
    parser.add_argument("--steps", type=int, default=35, help="the teacher's network calls, odd, for Heun (default %(default)s)")
    parser.add_argument("--batch", type=int, default=200, help="images per call (default %(default)s)")
    parser.add_argument("--ema", help="which average of the workdir; default: the first")
    parser.add_argument("--out", help="X.json for the figures")
    parser.add_argument("--grid", help="X.png for captions and images")
    return parser


def _check(args: argparse.Namespace) -> None:
    for flag, value, least in (("--num", args.num, 100), ("--batch", args.batch, 1), ("--seed", args.seed, 0)):
        if value < least:
            raise ValueError(f"{flag}: got {value}, allowed: {least} or more")
    if args.steps < 1 or args.steps % 2 == 0:
        raise ValueError(f"--steps: got {args.steps}, allowed: odd numbers, as Heun's n steps take 2n - 1 network calls")
    for flag, value, suffix in (("--out", args.out, ".json"), ("--grid", args.grid, ".png")):
        if value is not None and pathlib.Path(value).suffix != suffix:
            raise ValueError(f"{flag}: got {value!r}, allowed: a name that ends in {suffix}")
    if not (pathlib.Path(args.workdir) / "config.json").is_file():
        raise ValueError(f"--workdir: got {args.workdir!r}, which has no config.json; allowed: the workdir of a run of configs/scenes.py")


def _drawers(args: argparse.Namespace) -> dict[str, tuple[Any, int]]:
    """{"teacher" or "generator": (captions -> images, network calls)}."""
    import jax

    from sim_jax import checkpoint, load
    from sim_jax.data import scenes
    from sim_jax.evals.generate import ImageSampler, SamplerSpec

    record = checkpoint.read_json(pathlib.Path(args.workdir) / "config.json")
    config = record["config"]
    loaded = load.load(args.workdir, ema=args.ema)
    networks = {"teacher" if loaded.few_step is None else "generator": loaded}
    if loaded.few_step is not None:
        networks = {"teacher": load.load_teacher(config["teacher"]["path"], ema=config["teacher"]["ema"], spec=record["network"]), **networks}
    if loaded.network.image_shape != (scenes.RESOLUTION, scenes.RESOLUTION, 3) or not loaded.network.text_dim:
        raise ValueError(f"--workdir: got {args.workdir!r}, a run whose images are no scenes; allowed: one of configs/scenes.py")
    section = config["teacher"]
    guided = dict(guidance=section["guidance"], interval=tuple(section["guidance_interval"]) or None) if args.guidance is None else dict(
        guidance=args.guidance)

    def drawer(found: load.Loaded) -> tuple[Any, int]:
        spec = SamplerSpec(few_step=found.few_step) if found.few_step else SamplerSpec(num_steps=(args.steps + 1) // 2, **guided)
        sampler = ImageSampler(found.network, spec, found.latents(), batch_per_device=args.batch)
        params = jax.tree.map(jax.numpy.asarray, found.params)
        return lambda captions: sampler(params, seed=args.seed, count=len(captions), text=captions)[0], spec.calls

    return {name: drawer(found) for name, found in networks.items()}


def _captions(num: int, seed: int) -> dict[str, Any]:
    """{set: numbers [num] of captions}: as training has them, and the two kinds of held-out ones."""
    import numpy as np

    from sim_jax.data import scene_captions

    captions = scene_captions.captions()
    kinds, pairs = (np.array([i for i, c in enumerate(captions) if c.held_out and c.new_kind == new]) for new in (True, False))
    return {"seen": scene_captions.draw_captions(seed, np.arange(num)), "held_out_kinds": np.resize(kinds, num),
            "held_out_pairs": np.resize(pairs, num)}


def measure(draw: Any, *, num: int, seed: int) -> dict[str, Any]:
    """The figures of one drawer: captions (`captions.Captions`) -> uint8 [N,16,16,3]."""
    import numpy as np

    from sim_jax.data import scene_captions, scenes, scenes_text
    from sim_jax.evals import scene_figures

    captions, out = scene_captions.captions(), {}
    for name, numbers in _captions(num, seed).items():
        chosen = scenes_text.chosen(numbers)
        images = draw(chosen)
        out[name] = scene_figures.attributes(images, chosen.prompts)
        if name == "seen":
            reference = scenes.draw_for([captions[i] for i in numbers], seed=seed, start=10**6)
            out["fd"] = scene_figures.frechet_distance(images, reference)
    varied = [scene_captions.parse(text) for text in VARIED for _ in range(SAMPLES)]
    shape = (len(VARIED), SAMPLES, scenes.RESOLUTION, scenes.RESOLUTION, 3)
    images = draw(scenes_text.chosen(np.array([captions.index(caption) for caption in varied])))
    out["diversity"] = scene_figures.diversity(images.reshape(shape), scenes.draw_for(varied, seed=seed, start=2 * 10**6).reshape(shape))
    return out


def _drawings(seed: int):
    """Drawings themselves as a drawer."""
    from sim_jax.data import scene_captions, scenes

    return lambda captions: scenes.draw_for([scene_captions.parse(text) for text in captions.prompts], seed=seed)


def _picture(drawers: dict[str, tuple[Any, int]], each: int = 10):
    """For every caption a row of `each` images of every drawer, uint8 [H,W,3]."""
    import numpy as np

    from sim_jax import images
    from sim_jax.data import scene_captions, scenes_text

    captions = [scene_captions.parse(text) for text in GRID]
    numbers = np.repeat([scene_captions.captions().index(caption) for caption in captions], each)
    rows = [draw(scenes_text.chosen(numbers)).reshape(len(GRID), each, 16, 16, 3) for draw, _ in drawers.values()]
    labels = [f"{caption.text}{' (held out)' * caption.held_out}: {name}, {calls} call{'s' * (calls > 1)}"
              for caption in captions for name, (_, calls) in drawers.items()]
    return images.grid(np.stack(rows, 1).reshape(-1, 16, 16, 3), columns=each, scale=2, pad=2, row_labels=labels)


def run(args: argparse.Namespace) -> int:
    _check(args)
    cli.use_compilation_cache()
    from sim_jax import files, images

    drawers = _drawers(args)
    report = {"num": args.num, "seed": args.seed, "drawings": measure(_drawings(args.seed), num=args.num, seed=args.seed)}
    for name, (draw, calls) in drawers.items():
        report[name] = {"calls": calls, **measure(draw, num=args.num, seed=args.seed)}
    for name in ("drawings", *drawers):
        print(name, _line(report[name]), flush=True)
    if args.out:
        files.write_atomically(args.out, lambda file: file.write(json.dumps(report, indent=2).encode()))
    if args.grid:
        images.save_png(args.grid, _picture(drawers))
    return 0


def _line(figures: dict[str, Any]) -> str:
    sets = "; ".join(f"{name} " + " ".join(f"{key} {100 * value:.1f}%" for key, value in figures[name].items())
                     for name in ("seen", "held_out_kinds", "held_out_pairs"))
    return (f"{sets}; fd {figures['fd']:.3f}; diversity " + " ".join(f"{key} {value:.3f}" for key, value in figures["diversity"].items()))


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    return cli.guard(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
