"""Draws images from a distilled generator, or from a teacher.

    python -m sim_jax.sample --workdir=runs/digits --num=100 --seed=0 --out=samples.png
    python -m sim_jax.sample --workdir=runs/digits --num=50000 --classes=0,3 --out=samples.npz
    python -m sim_jax.sample --workdir=runs/digits --teacher --steps=35 --num=100 --out=teacher.png
    python -m sim_jax.sample --weights=builtin:digits --num=100 --out=teacher.png

Image i depends on (seed, i) and its class only, not on --batch, nor on the number of devices or processes beyond rounding.
"""

from __future__ import annotations

import argparse
import sys

from sim_jax import cli, distributed


def _parser() -> argparse.ArgumentParser:
    from sim_jax import sampler_flags

    parser = argparse.ArgumentParser(prog="python -m sim_jax.sample", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", help="of a run of sim_jax.main")
    source.add_argument("--weights", help="a directory of weights, a .safetensors file, or builtin:digits")
    parser.add_argument("--out", required=True, help="X.png (a grid), X.npz (images, labels) or X.zip (EDM's dataset layout)")
    parser.add_argument("--num", type=int, default=100, help="how many images (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    parser.add_argument("--classes", help="class numbers to take in turn, e.g. 0,3 or 0-4; default: drawn as in training")
    sampler_flags.add(parser)
    parser.add_argument("--batch", type=int, default=128, help="images per device and call (default %(default)s)")
    distributed.add_arguments(parser)
    return parser


def _check(args: argparse.Namespace) -> None:
    from sim_jax import images

    for flag, value in (("--num", args.num), ("--batch", args.batch)):
        if value < 1:
            raise ValueError(f"{flag}: got {value}, allowed: 1 or more")
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed: got {args.seed}, allowed: 0 to {2**32 - 1}")
    if args.teacher and not args.workdir:
        raise ValueError("--teacher: allowed only with --workdir; --weights of a teacher need no flag")
    images.check_samples_path(args.out)


def run(args: argparse.Namespace) -> int:
    cli.use_compilation_cache()
    distributed.start(args)
    distributed.together(lambda: _check(args))
    import jax
    import numpy as np

    from sim_jax import images, sampler_flags, sharding
    from sim_jax.data import labels
    from sim_jax.evals.generate import ImageSampler
    from sim_jax.progress import ProgressBar

    loaded = sampler_flags.find(args, workdir=args.workdir, weights=args.weights)
    network = loaded.network
    spec = distributed.together(lambda: sampler_flags.spec(args, loaded))
    classes = None
    if args.classes is not None:
        classes = np.resize(distributed.together(lambda: labels.parse_classes(args.classes, network.label_dim)), args.num)
    # Only as many devices as there are full batches, the rest would draw padding; but every process has to take part.
    count = jax.device_count() if distributed.several() else max(1, min(jax.device_count(), -(-args.num // args.batch)))
    layout = sharding.Layout(sharding.make_mesh(devices=jax.devices()[:count]))
    distributed.connect(layout.mesh)
    sampler = ImageSampler(network, spec, loaded.latents(), layout=layout, batch_per_device=args.batch)
    params = sharding.place(loaded.params, jax.tree.map(lambda _: layout.replicated, loaded.params))
    bar = ProgressBar(args.num, description="sample", unit="images", enabled=distributed.is_first())
    pixels, drawn = sampler(params, seed=args.seed, count=args.num, classes=classes, progress=bar.update)
    bar.close()
    metadata = {"seed": str(args.seed), "calls": str(spec.calls), **{k: str(v) for k, v in loaded.origin.items()}}
    distributed.by_first(lambda: images.save_samples(args.out, pixels, drawn if network.label_dim else None, metadata=metadata))
    distributed.say(f"{args.num} images, {spec.calls} network call{'s' if spec.calls > 1 else ''} each: {args.out}")
    return 0


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    return cli.guard(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
