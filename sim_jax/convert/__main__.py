"""Turns a checkpoint of another code base into a directory of weights, executing nothing in it.

    python -m sim_jax.convert --kind=edm --src=edm-cifar10-32x32-cond-vp.pkl --out=teachers/cifar10-cond-vp
    python -m sim_jax.sample --weights=teachers/cifar10-cond-vp --num=100 --out=teacher.png

Configs name the directory as config.teacher.path; of kind inception, evaluation takes it as --features. Kinds:
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from typing import Any

from sim_jax import cli
from sim_jax.convert import conversion, kinds


def _parser() -> argparse.ArgumentParser:
    table = "\n".join(f"    {name:12} {kind.summary}" for name, kind in kinds.TABLE.items())
    parser = argparse.ArgumentParser(prog="python -m sim_jax.convert", description=__doc__ + "\n" + table,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", required=True, choices=list(kinds.TABLE), help="the family that the file comes from")
    parser.add_argument("--src", required=True, help="the file")
    parser.add_argument("--out", required=True, help="the directory to write: network.json and params.safetensors")
    parser.add_argument("--ema", help="fastgen: which average of a training checkpoint, or net; default: its first average")
    parser.add_argument("--network", default="{}", metavar="JSON",
                        help="description keys that a state dict cannot hold, such as '{\"precond\": \"VPPrecond\"}'")
    parser.add_argument("--sigma-init", metavar="SIGMA", help="of a one-step generator, x = D(SIGMA z; SIGMA), or none for a "
                                                              "denoiser; default: what the kind says")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16"], help="stored as (default %(default)s)")
    return parser


def _network(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"--network: got {text!r}, allowed: a JSON object such as '{{\"precond\": \"VPPrecond\"}}'")
    return {key: tuple(v) if isinstance(v, list) else v for key, v in value.items()}


def _with_sigma_init(info: Mapping[str, Any], text: str | None) -> dict[str, Any]:
    info = dict(info)
    if text is None:
        return info
    info.pop("sigma_init", None)
    if text == "none":
        return info
    try:
        sigma = float(text)
    except ValueError:
        sigma = 0.0
    if not 0 < sigma < 1e6:
        raise ValueError(f"--sigma-init: got {text!r}, allowed: a positive number, or none")
    return {**info, "sigma_init": sigma}


def _summary(converted: conversion.Converted, info: Mapping[str, Any], purpose: str) -> str:
    spec, size = converted.network.spec, f"{converted.network.num_params():,} parameters"
    if "precond" not in spec:
        return f"{spec['model_type']}, {size}, {purpose}"
    sigma, pixels = info.get("sigma_init"), spec["img_resolution"]
    what = f"a one-step generator at sigma {sigma:g}" if sigma else "a denoiser"
    takes = f"captions of {converted.network.text_dim} channels" if converted.network.text_dim else f"{spec['label_dim']} classes"
    return f"{spec['precond']} of {spec['model_type']}, {pixels}x{pixels}, {takes}, {size}, {what}"


def run(args: argparse.Namespace) -> int:
    from sim_jax import weights
    from sim_jax.progress import ProgressBar

    options = conversion.Options(network=_network(args.network), ema=args.ema)
    if args.ema is not None and args.kind != "fastgen":
        raise ValueError(f"--ema: got {args.ema!r} with --kind={args.kind}, allowed only with fastgen")
    if args.sigma_init is not None and not kinds.TABLE[args.kind].generates:
        raise ValueError(f"--sigma-init: got {args.sigma_init!r} with --kind={args.kind}, allowed only with kinds that make images")
    converted = kinds.read(args.kind, args.src, options)
    info = {**_with_sigma_init(converted.info, args.sigma_init), "source": {"kind": args.kind, "file": args.src.rsplit("/", 1)[-1]}}
    total = sum(array.size for array in converted.state.values()) // 1000
    bar = ProgressBar(total, description="convert", unit="thousand numbers")
    weights.save_state_directory(args.out, converted.state, converted.network.spec, info, dtype=args.dtype,
                                 progress=lambda numbers: bar.update(numbers // 1000))
    bar.close()
    print(f"{_summary(converted, info, kinds.TABLE[args.kind].purpose)}: {args.out}")
    return 0


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    return cli.guard(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
