"""How well images fit their prompts, and how people would like them, by networks whose weights the user has.

    python -m sim_jax.sample --workdir=RUN --prompts=prompts.txt --encoder=T5 --autoencoder=VAE --out=folder
    python -m sim_jax.evals.text_scores --images=folder --clip=CLIP --aesthetic=sac+logos+ava1-l14-linearMSE.pth --out=scores.json

    clip        mean cosine of the image's and the prompt's CLIP embeddings (Hessel et al., arXiv 2104.08718, without its factor 2.5);
                DMD2 puts "A photo depicts " in front of COCO's captions and reads ViT-G/14 [repo]: --prefix
    aesthetic   LAION's aesthetic predictor: a stack of linear layers on the unit embedding of an image by CLIP ViT-L/14

CLIP is a directory in `transformers`' format; pip install 'sim_jax[text]'. Images are the files that `sim_jax.sample` writes into a folder,
each with its prompt.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from sim_jax import cli, files
from sim_jax.evals import text_metrics
from sim_jax.progress import ProgressBar


def read_folder(folder: str | pathlib.Path) -> list[tuple[pathlib.Path, str]]:
    """The PNG files of a folder and their prompts. Raises: ValueError for a folder without any, or files without prompts."""
    paths = sorted(pathlib.Path(folder).glob("*.png")) if pathlib.Path(folder).is_dir() else []
    if not paths:
        raise ValueError(f"--images: got {str(folder)!r}, allowed: a folder of PNG files that sim_jax.sample wrote from prompts")
    out = []
    for path in paths:
        try:
            with Image.open(path) as image:
                prompt = image.info.get("prompt")
        except OSError as error:
            raise ValueError(f"--images: {path} cannot be read ({error})") from None
        if not prompt:
            raise ValueError(f"--images: {path} has no prompt, allowed: PNG files that sim_jax.sample wrote from prompts")
        out.append((path, prompt))
    return out


def _pixels(paths: Sequence[pathlib.Path]) -> list[np.ndarray]:
    out = []
    for path in paths:
        with Image.open(path) as image:
            out.append(np.asarray(image.convert("RGB")))
    return out


def score(found: Sequence[tuple[pathlib.Path, str]], clip: text_metrics.Clip, aesthetic: text_metrics.Aesthetic | None = None, *,
          prefix: str = "", batch: int = 32, progress=lambda done: None) -> dict[str, Any]:
    """{"clip", "aesthetic" (where there is a predictor), "protocol"} of files and their prompts; means over the images."""
    cosines, liked = [], []
    for start in range(0, len(found), batch):
        part = found[start: start + batch]
        images, texts = clip.embed(_pixels([path for path, _ in part]), [prefix + prompt for _, prompt in part])
        cosines.append(np.sum(images * texts, axis=1))
        if aesthetic is not None:
            liked.append(aesthetic(images))
        progress(start + len(part))
    protocol = {"count": len(found), "clip": clip.name, "prefix": prefix, "aesthetic": aesthetic and aesthetic.name}
    more = {} if aesthetic is None else {"aesthetic": float(np.mean(np.concatenate(liked)))}
    return {"clip": float(np.mean(np.concatenate(cosines))), **more, "protocol": protocol}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sim_jax.evals.text_scores", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="a folder that sim_jax.sample wrote from prompts")
    parser.add_argument("--clip", required=True, help="a directory with a CLIP and its processor")
    parser.add_argument("--aesthetic", help="the predictor's weights, .pth or .safetensors; needs CLIP ViT-L/14")
    parser.add_argument("--prefix", default="", help="in front of every prompt, e.g. 'A photo depicts '")
    parser.add_argument("--batch", type=int, default=32, help="images at a time (default %(default)s)")
    parser.add_argument("--out", help="X.json")
    return parser


def run(args: argparse.Namespace) -> int:
    if args.batch < 1:
        raise ValueError(f"--batch: got {args.batch}, allowed: 1 or more")
    found = read_folder(args.images)
    clip = text_metrics.open_clip(args.clip)
    aesthetic = None if args.aesthetic is None else text_metrics.open_aesthetic(args.aesthetic, width=clip.width)
    with ProgressBar(len(found), description="score", unit="images") as bar:
        scores = score(found, clip, aesthetic, prefix=args.prefix, batch=args.batch, progress=bar.update)
    print("  ".join(f"{name} {value:.4f}" for name, value in scores.items() if name != "protocol") + f"  ({len(found)} images)", flush=True)
    if args.out:
        files.write_atomically(args.out, lambda file: file.write(json.dumps(scores, indent=1).encode() + b"\n"), key="--out")
    return 0


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    return cli.guard(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
