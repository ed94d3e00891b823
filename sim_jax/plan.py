"""What a config needs on devices that are not at hand: memory per device, operations, messages between devices, and what to change.

    python -m sim_jax.plan --config=configs/imagenet64.py --topology=v5e:2x4 "--config.sharding.rules=(('.*','fsdp'),)"

With libtpu installed (pip install libtpu) programs for TPUs are compiled, without a TPU: memory and messages are then the compiler's own.
Elsewhere, and with --estimate=arithmetic, states are exact (shapes and shardings) and activations an estimate (sim_jax/footprint.py).
--estimate=cpu compiles for as many CPU devices: the same messages, but a memory that no accelerator would need.

    python -m sim_jax.plan --table --out=configs/plans.md        the table of the shipped configs; plans that it has are kept
"""

from __future__ import annotations

import argparse
import json
import sys

from sim_jax import cli

_ESTIMATES = ("auto", "compile", "cpu", "arithmetic")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sim_jax.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--config", help="a config file with its words, such as configs/cifar10.py:cond; then --config.KEY=VALUE")
    parser.add_argument("--topology", default="v5e:2x4", help="TPU chips such as v5e:2x4, v5p:2x2x1, v6e:2x4, or GPUs such as h100:8 "
                                                              "(default %(default)s)")
    parser.add_argument("--estimate", default="auto", help="auto, compile, cpu or arithmetic (default %(default)s)")
    parser.add_argument("--effort", default="fast", help="of the compiler: fast (its level O0: minutes instead of an hour; more memory than "
                                                         "the program that will run) or full (default %(default)s)")
    parser.add_argument("--advise", action="store_true", help="say what each change would buy even where everything fits")
    parser.add_argument("--table", action="store_true", help="plan the shipped configs on the usual slices; takes no --config")
    parser.add_argument("--out", help="the plan as JSON, or with --table the table as Markdown")
    return parser


def run(args: argparse.Namespace, overrides: list[str]) -> int:
    """The command. Raises ValueError for bad input, before anything is compiled."""
    from sim_jax import config_file, topologies

    for flag, got, allowed in (("--estimate", args.estimate, _ESTIMATES), ("--effort", args.effort, ("fast", "full"))):
        if got not in allowed:
            raise ValueError(f"{flag}: got {got!r}, allowed: {', '.join(allowed)}")
    if args.table:
        if args.config or overrides or not args.out:
            raise ValueError("--table: needs --out=FILE.md, and takes no --config")
        from sim_jax import plan_table

        return plan_table.write(args.out, effort=args.effort, estimate=args.estimate)
    if not args.config:
        raise ValueError("--config: missing; usage: python -m sim_jax.plan --config=configs/imagenet64.py --topology=v5e:2x4")
    topology = topologies.parse(args.topology)
    config = config_file.load(args.config)
    config_file.override(config, overrides)
    from sim_jax import planning

    plan = planning.make(config, topology, estimate=args.estimate, effort=args.effort, name=" ".join([args.config, *overrides]))
    if args.advise or not plan["fits"]:
        plan["advice"] = planning.advise(config, topology, plan)
    print(planning.render(plan))
    if args.out:
        from sim_jax import files

        files.write_atomically(args.out, lambda file: file.write(json.dumps(plan, indent=1).encode() + b"\n"), key="--out")
    return 0


def main(argv: list[str] | None = None) -> int:
    args, overrides = _parser().parse_known_args(argv)

    def work() -> int:
        import jax

        jax.config.update("jax_platforms", "cpu")  # a plan is made beside whatever runs on the accelerators
        return run(args, overrides)

    return cli.guard(work)


if __name__ == "__main__":
    sys.exit(main())
