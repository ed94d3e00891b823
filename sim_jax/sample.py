"""Draws images from a distilled generator, or from a teacher.

    python -m sim_jax.sample --workdir=runs/digits --num=100 --seed=0 --out=samples.png
    python -m sim_jax.sample --workdir=runs/digits --num=50000 --classes=0,3 --out=samples.npz
    python -m sim_jax.sample --workdir=runs/digits --teacher --steps=35 --num=100 --out=teacher.png
    python -m sim_jax.sample --weights=builtin:digits --num=100 --out=teacher.png

Image i depends on (seed, i) and its class only, not on --batch or the number of devices.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys

from sim_jax import cli


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sim_jax.sample", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", help="of a run of sim_jax.main")
    source.add_argument("--weights", help="a directory of weights, a .safetensors file, or builtin:digits")
    parser.add_argument("--out", required=True, help="X.png (a grid), X.npz (images, labels) or X.zip (EDM's dataset layout)")
    parser.add_argument("--num", type=int, default=100, help="how many images (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    parser.add_argument("--classes", help="class numbers to take in turn, e.g. 0,3 or 0-4; default: drawn as in training")
    parser.add_argument("--ema", help="which average of a workdir, e.g. ema_500k, or raw; default: the first")
    parser.add_argument("--teacher", action="store_true", help="sample the teacher that the workdir's run distilled")
    parser.add_argument("--steps", type=int, help="network calls: at most its own for a one- or few-step generator; an odd number for "
                                                  "teachers (Heun takes 2n - 1; default 35)")
    parser.add_argument("--guidance", type=float, default=1.0, help="teachers with classes and label dropout: classifier-free guidance "
                                                                    "weight (default 1, none; twice the calls)")
    parser.add_argument("--churn", type=float, default=0.0, help="teachers: EDM's S_churn (default 0, deterministic)")
    parser.add_argument("--batch", type=int, default=128, help="images per device and call (default %(default)s)")
    return parser


def _check(args: argparse.Namespace) -> None:
    for flag, value in (("--num", args.num), ("--batch", args.batch)):
        if value < 1:
            raise ValueError(f"{flag}: got {value}, allowed: 1 or more")
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed: got {args.seed}, allowed: 0 to {2**32 - 1}")
    if args.teacher and not args.workdir:
        raise ValueError("--teacher: allowed only with --workdir; --weights of a teacher need no flag")


def _find(args: argparse.Namespace):
    """What to sample, as `load.Loaded`."""
    import pathlib

    from sim_jax import checkpoint, load

    if args.workdir is None:
        return load.load(args.weights, ema=args.ema)
    config = pathlib.Path(args.workdir) / "config.json"
    if not config.is_file():
        raise ValueError(f"--workdir: got {args.workdir!r}, which has no config.json; allowed: the workdir of a run")
    if not args.teacher:
        return load.load(args.workdir, ema=args.ema)
    record = checkpoint.read_json(config)
    if record["config"]["method"] == "dsm":
        return load.load(args.workdir, ema=args.ema)
    teacher = record["config"]["teacher"]
    return load.load_teacher(teacher["path"], ema=teacher["ema"], spec=record["network"])


def run(args: argparse.Namespace) -> int:
    _check(args)
    from sim_jax import images

    images.check_samples_path(args.out)
    cli.use_compilation_cache()
    import jax
    import jax.numpy as jnp
    import numpy as np

    from sim_jax import sharding
    from sim_jax.data import labels
    from sim_jax.evals.generate import ImageSampler, SamplerSpec
    from sim_jax.progress import ProgressBar

    loaded = _find(args)
    network = loaded.network
    if loaded.few_step is not None:
        calls = len(loaded.few_step.sigmas)
        kind = "a one-step generator" if calls == 1 else f"a generator of {calls} steps"
        if args.steps is not None and not 1 <= args.steps <= calls:
            raise ValueError(f"--steps: got {args.steps}, allowed: {'1' if calls == 1 else f'1 to {calls}'}, this is {kind}")
        for flag, value, neutral in (("--churn", args.churn, 0), ("--guidance", args.guidance, 1)):
            if value != neutral:
                raise ValueError(f"{flag}: got {value:g}, allowed: {neutral}, this is {kind}")
        plan = loaded.few_step
        spec = SamplerSpec(few_step=plan if args.steps is None else dataclasses.replace(plan, sigmas=plan.sigmas[: args.steps]))
    else:
        calls = 35 if args.steps is None else args.steps
        if calls < 1 or calls % 2 == 0:
            raise ValueError(f"--steps: got {calls}, allowed: odd numbers, as Heun's n steps take 2n - 1 network calls")
        if args.guidance != 1 and not network.label_dim:
            raise ValueError(f"--guidance: got {args.guidance:g}, allowed: 1, this network takes no classes")
        spec = SamplerSpec(num_steps=(calls + 1) // 2, S_churn=args.churn, guidance=args.guidance)
    classes = None
    if args.classes is not None:
        wanted = labels.parse_classes(args.classes, network.label_dim)
        classes = np.resize(wanted, args.num)
    # Only as many devices as there are full batches: the rest would draw padding.
    devices = jax.devices()[: max(1, min(jax.device_count(), -(-args.num // args.batch)))]
    layout = sharding.Layout(sharding.make_mesh(devices=devices))
    sampler = ImageSampler(network, spec, loaded.latents(), layout=layout, batch_per_device=args.batch)
    params = jax.device_put(jax.tree.map(jnp.asarray, loaded.params), layout.replicated)
    bar = ProgressBar(args.num, description="sample", unit="images")
    pixels, drawn = sampler(params, seed=args.seed, count=args.num, classes=classes, progress=bar.update)
    bar.close()
    images.save_samples(args.out, pixels, drawn if network.label_dim else None,
                        metadata={"seed": str(args.seed), "calls": str(spec.calls), **{k: str(v) for k, v in loaded.origin.items()}})
    print(f"{args.num} images, {spec.calls} network call{'s' if spec.calls > 1 else ''} each: {args.out}")
    return 0


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    return cli.guard(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
