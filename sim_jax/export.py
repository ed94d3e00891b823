"""Writes a trained network as safetensors under EDM's PyTorch names.

    python -m sim_jax.export --workdir=runs/digits --out=generator.safetensors
    python -m sim_jax.export --workdir=runs/teacher --out=teachers/digits         # a directory that configs name as teacher.path

The file's metadata ("sim_jax") holds EDM's constructor arguments, a content hash, and sigma_init for one-step generators.
"""

from __future__ import annotations

import argparse
import sys

from sim_jax import cli


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sim_jax.export", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="of a run of sim_jax.main")
    parser.add_argument("--out", required=True, help="X.safetensors, or a directory")
    parser.add_argument("--ema", help="which average, e.g. ema_500k, or raw; default: the first")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16"], help="stored as (default %(default)s)")
    return parser


def run(args: argparse.Namespace) -> int:
    import pathlib

    from sim_jax import checkpoint, load, weights

    if not (pathlib.Path(args.workdir) / "config.json").is_file():
        raise ValueError(f"--workdir: got {args.workdir!r}, which has no config.json; allowed: the workdir of a run")
    loaded = load.load(args.workdir, ema=args.ema)
    record = checkpoint.read_json(pathlib.Path(args.workdir) / "config.json")
    info = {"step": loaded.origin["step"], "ema": loaded.origin["ema"], "labels": dict(loaded.labels),
            "made_by": {"command": record["command"], "seed": record["config"]["seed"], "versions": record["versions"]}}
    report = pathlib.Path(args.workdir) / "report.json"
    if report.is_file():
        figures = checkpoint.read_json(report)
        info["figures"] = {key: figures[key] for key in ("teacher", "generator", "real_halves", "protocol", "device") if key in figures}
    info |= load.few_step_info(loaded.few_step) | ({} if loaded.text_encoder is None else {"text_encoder": loaded.text_encoder})
    save = weights.save_file if args.out.endswith(".safetensors") else weights.save_directory
    save(args.out, loaded.params, loaded.network.spec, info, dtype=args.dtype)
    print(f"{loaded.network.num_params():,} parameters, {loaded.origin['ema']} at step {loaded.origin['step']}: {args.out}")
    return 0


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    return cli.guard(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
