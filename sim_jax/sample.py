"""Draws images from a distilled generator, or from a teacher.

    python -m sim_jax.sample --workdir=runs/digits --num=100 --seed=0 --out=samples.png
    python -m sim_jax.sample --workdir=runs/digits --num=50000 --classes=0,3 --out=samples.npz
    python -m sim_jax.sample --workdir=runs/digits --teacher --steps=35 --num=100 --out=teacher.png
    python -m sim_jax.sample --weights=builtin:digits --num=100 --out=teacher.png
    python -m sim_jax.sample --weights=generators/sim --prompt="a fox in tall grass" --encoder=t5 --autoencoder=autoencoders/sd --out=folder

Image i depends on (seed, i), its class and its caption only, not on --batch, nor on the number of devices or processes beyond rounding.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

from sim_jax import cli, distributed


def _parser() -> argparse.ArgumentParser:
    from sim_jax import sampler_flags, text_flags

    parser = argparse.ArgumentParser(prog="python -m sim_jax.sample", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", help="of a run of sim_jax.main")
    source.add_argument("--weights", help="a directory of weights, a .safetensors file, or builtin:digits")
    parser.add_argument("--out", required=True, help="X.png (a grid), X.npz (images, labels), X.zip (EDM's dataset layout), or, from "
                                                        "text, a folder: an image a file, with its prompt")
    parser.add_argument("--num", type=int, help="how many images (default: 100; from text one for each prompt)")
    parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    parser.add_argument("--classes", help="class numbers to take in turn, e.g. 0,3 or 0-4; default: drawn as in training")
    sampler_flags.add(parser)
    text_flags.add(parser)
    parser.add_argument("--batch", type=int, default=128, help="images per device and call (default %(default)s)")
    distributed.add_arguments(parser)
    return parser


def _check(args: argparse.Namespace) -> None:
    from sim_jax import images, text_flags

    for flag, value in (("--num", args.num), ("--batch", args.batch)):
        if value is not None and value < 1:
            raise ValueError(f"{flag}: got {value}, allowed: 1 or more")
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed: got {args.seed}, allowed: 0 to {2**32 - 1}")
    if args.teacher and not args.workdir:
        raise ValueError("--teacher: allowed only with --workdir; --weights of a teacher need no flag")
    text_flags.check(args)
    if not _is_folder(args):
        images.check_samples_path(args.out)


def _is_folder(args: argparse.Namespace) -> bool:
    """Whether images go to files of their own: names without a suffix, where there are prompts to go with them."""
    return bool(args.prompt or args.prompts or args.captions) and not pathlib.Path(args.out).suffix


def run(args: argparse.Namespace) -> int:
    cli.use_compilation_cache()
    distributed.start(args)
    distributed.together(lambda: _check(args))
    import jax
    import numpy as np

    from sim_jax import sampler_flags, sharding, text_flags
    from sim_jax.data import labels
    from sim_jax.evals.generate import ImageSampler
    from sim_jax.progress import ProgressBar

    loaded = sampler_flags.find(args, workdir=args.workdir, weights=args.weights)
    network = loaded.network
    text = distributed.together(lambda: text_flags.find(args, loaded))
    spec = distributed.together(lambda: sampler_flags.spec(args, loaded, text))
    num = (100 if text is None else len(text)) if args.num is None else args.num
    classes = None
    if args.classes is not None:
        classes = np.resize(distributed.together(lambda: labels.parse_classes(args.classes, network.label_dim)), num)
    # Only as many devices as there are full batches, the rest would draw padding; but every process has to take part.
    count = jax.device_count() if distributed.several() else max(1, min(jax.device_count(), -(-num // args.batch)))
    layout = sharding.Layout(sharding.make_mesh(devices=jax.devices()[:count]))
    distributed.connect(layout.mesh)
    decode = distributed.together(lambda: text_flags.decoder(args, loaded, layout))
    sampler = ImageSampler(network, spec, loaded.latents(), layout=layout, batch_per_device=args.batch, decode=decode)
    params = sharding.place(loaded.params, jax.tree.map(lambda _: layout.replicated, loaded.params))
    bar = ProgressBar(num, description="sample", unit="images", enabled=distributed.is_first())
    pixels, drawn = sampler(params, seed=args.seed, count=num, classes=classes, text=text, progress=bar.update)
    bar.close()
    metadata = {"seed": str(args.seed), "calls": str(spec.calls), **{k: str(v) for k, v in loaded.origin.items()}}
    distributed.by_first(lambda: _save(args, pixels, drawn if network.label_dim else None, metadata, text))
    distributed.say(f"{num} images, {spec.calls} network call{'s' if spec.calls > 1 else ''} each: {args.out}")
    return 0


def _save(args: argparse.Namespace, pixels, classes, metadata: dict[str, str], text) -> None:
    from sim_jax import images

    prompts = [] if text is None else [text.prompts[i % len(text)] for i in range(len(pixels))]
    if _is_folder(args):
        images.save_folder(args.out, pixels, about=[{"prompt": prompt, "index": str(i), **metadata} for i, prompt in enumerate(prompts)])
    else:
        images.save_samples(args.out, pixels, classes, metadata={**metadata, **({"prompts": prompts} if prompts else {})})


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    return cli.guard(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
