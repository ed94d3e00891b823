"""Captions to a text encoder's states, once, for training from prompts alone.

    python -m sim_jax.data.embed_prompts --prompts=configs/prompts.txt --encoder=PATH --out=DIR --max_tokens=120

A prompt a line, blank lines are left out. PATH is a directory with a T5 and its tokenizer (PixArt-alpha's: T5-v1.1-XXL), which needs
pip install 'sim_jax[text]'; or builtin:NAME. The same command again goes on where it was stopped. Training reads the directory
(config.text.path=DIR) without the encoder; `sim_jax.data.embedded` says what is in it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from sim_jax import cli, files
from sim_jax.data import captions, embedded, encoders
from sim_jax.data.encoders import Encoder
from sim_jax.progress import ProgressBar

_JOB = "job.json"  # what the directory is going to hold, before it does


def embed(prompts: Sequence[str], encoder: Encoder, out: str | pathlib.Path, *, batch: int = 64, shard: int = 4096,
          note=lambda text: print(text, file=sys.stderr), progress: bool = False) -> dict[str, Any]:
    """Writes the directory, or what is missing of it.

    Args:
      prompts: in order.
      encoder: see `encoders`.
      out: the directory.
      batch: prompts that are encoded at a time.
      shard: prompts in a file.
      note: called with a line where prompts are cut, or a part is already there.
      progress: shows a bar.
    Returns: the manifest.
    Raises: ValueError for no prompts, a batch or shard below 1, or a directory that holds something else.
    """
    for key, value in (("prompts", len(prompts)), ("batch", batch), ("shard", shard)):
        if value < 1:
            raise ValueError(f"{key}: got {value}, allowed: 1 or more")
    out, count = pathlib.Path(out), -(-len(prompts) // shard)
    job = {"format": embedded.FORMAT, "encoder": encoder.name, "width": encoder.width, "max_tokens": encoder.max_tokens, "count": len(prompts),
           "prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest(), "shard": shard}
    _claim(out, job)
    truncated, warning = captions.cut(encoder, prompts)
    if warning:
        note(warning)
    names = [embedded.shard_name(k, count) for k in range(count)]
    done = [k for k in range(count) if (out / names[k]).is_file()]
    if done:
        note(f"{len(done)} of {count} shards are there already")
    bar = ProgressBar(len(prompts), initial=sum(len(prompts[k * shard: (k + 1) * shard]) for k in done), description="embed", unit="prompts",
                      enabled=progress)
    _write(out / embedded.NULL, [""], encoder, 1)
    for k in sorted(set(range(count)) - set(done)):
        _write(out / names[k], prompts[k * shard: (k + 1) * shard], encoder, batch, lambda n, k=k: bar.update(k * shard + n))
    bar.close()
    shards = [{"file": name, "count": len(prompts[k * shard: (k + 1) * shard]), "bytes": (out / name).stat().st_size}
              for k, name in enumerate(names)]
    manifest = {**job, "truncated": truncated, "shards": shards}
    _write_json(out / embedded.MANIFEST, manifest)
    return manifest


def _claim(out: pathlib.Path, job: dict[str, Any]) -> None:
    """Makes the directory this job's. Raises: ValueError where it is another's."""
    files.make_folder(out, key="--out")
    there = sorted(path.name for path in out.iterdir())
    if _JOB in there:
        try:
            other = json.loads((out / _JOB).read_text())
        except (ValueError, OSError) as error:
            raise ValueError(f"--out: {out / _JOB} is damaged ({error})") from None
        different = [key for key in job if not isinstance(other, dict) or other.get(key) != job[key]]
        if different:
            what = ", ".join(f"{key} {other.get(key)!r} instead of {job[key]!r}" for key in different[:3]) if isinstance(other, dict) else "nothing"
            raise ValueError(f"--out: got {str(out)!r}, which holds other captions ({what}); allowed: the same job, or an empty folder")
    elif there:
        raise ValueError(f"--out: got {str(out)!r}, which holds {there[0]!r}; allowed: an empty folder")
    else:
        _write_json(out / _JOB, job)


def _write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    files.write_atomically(path, lambda file: file.write((json.dumps(content, indent=1) + "\n").encode()), key="--out")


def _write(path: pathlib.Path, prompts: Sequence[str], encoder: Encoder, batch: int, progress=lambda done: None) -> None:
    def records():
        for start in range(0, len(prompts), batch):
            part = prompts[start: start + batch]
            states, mask = encoder.encode(part)
            for prompt, tokens, valid in zip(part, states, mask, strict=True):
                yield embedded.pack(prompt, tokens[valid])
            progress(start + len(part))

    embedded.write_shard(path, records())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sim_jax.data.embed_prompts", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--prompts", required=True, help="a text file, a prompt a line")
    parser.add_argument("--encoder", required=True, help="a directory with a T5 and its tokenizer, or builtin:NAME")
    parser.add_argument("--out", required=True, help="a folder, empty or of the same job")
    parser.add_argument("--max_tokens", type=int, help="longer prompts are cut (default: 120, or the built-in encoder's own)")
    parser.add_argument("--batch", type=int, default=64, help="prompts at a time (default %(default)s)")
    parser.add_argument("--dtype", default="float32", help="what a T5 computes in: float32 or bfloat16 (default %(default)s)")
    parser.add_argument("--shard", type=int, default=4096, help="prompts in a file (default %(default)s)")
    return parser


def run(args: argparse.Namespace) -> int:
    prompts = captions.read_prompts(args.prompts)
    for flag, value in (("--batch", args.batch), ("--shard", args.shard)):
        if value < 1:
            raise ValueError(f"{flag}: got {value}, allowed: 1 or more")
    encoder = encoders.open_encoder(args.encoder, max_tokens=args.max_tokens, dtype=args.dtype, key="--encoder")
    manifest = embed(prompts, encoder, args.out, batch=args.batch, shard=args.shard, progress=True)
    size = sum(entry["bytes"] for entry in manifest["shards"])
    print(f"{manifest['count']} captions of {manifest['width']} channels, {size / 2**20:.1f} MiB: {args.out}", flush=True)
    return 0


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    return cli.guard(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
