"""Trains a one-step generator by distillation, or a teacher.

    python -m sim_jax.main --config=configs/digits.py --workdir=runs/digits
    python -m sim_jax.main --config=configs/cifar10.py:cond --workdir=runs/cifar10 --config.batch_size=512

The same command again resumes. SIGTERM and SIGINT save first (exit codes 143 and 130). Bad input ends with one line and exit code 2.
"""

from __future__ import annotations

import os
import re
import sys
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from sim_jax import cli, config_file

_USAGE = "python -m sim_jax.main --config=configs/digits.py --workdir=runs/digits"


def _flags(config: ConfigDict | None, argv: list[str]) -> flags.FlagValues:
    """The flags of one call, not yet parsed; `argv` says which keys of `config` are overridden.

    Raises: KeyError or AttributeError for a key that `config` does not have.
    """
    values = flags.FlagValues()
    if config is None:  # for --help
        flags.DEFINE_string("config", None, "Config file, with its words after a colon: configs/cifar10.py:cond,tiny. "
                                            "--config.KEY=VALUE overrides a key.", flag_values=values)
    else:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    flags.DEFINE_string("workdir", None, "Folder for checkpoints, figures, pictures and the report.", flag_values=values)
    flags.DEFINE_enum("distributed", "auto", ["auto", "on", "off"],
                      "Several processes: found by TPU pods, SLURM and Open MPI; 'on' insists.", flag_values=values)
    return values


def _parse(argv: list[str]) -> tuple[ConfigDict, flags.FlagValues, list[str]]:
    """Command line -> (config, flags, overrides). Raises ValueError for anything wrong in it."""
    rest, name = [], None
    arguments = iter(argv)
    for argument in arguments:
        if argument in ("--config", "-config"):
            name = next(arguments, None)
        elif argument.startswith(("--config=", "-config=")):
            name = argument.split("=", 1)[1]
        else:
            rest.append(argument)
    if not name:
        raise ValueError(f"--config: missing; usage: {_USAGE}")
    config = config_file.load(name)
    overrides = [a for a in rest if re.match(r"--?(no)?config\.", a)]
    try:
        values = _flags(config, rest)
        positional = values(rest)[1:]
    except flags.Error as error:
        raise ValueError(str(error)) from None
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(_explain(config, overrides, error)) from None
    if positional:
        raise ValueError(f"arguments: got {positional[0]!r}, allowed: --config=FILE --workdir=FOLDER --config.KEY=VALUE")
    if not values.workdir:
        raise ValueError(f"--workdir: missing; usage: {_USAGE}")
    return config, values, overrides


def _explain(config: ConfigDict, overrides: list[str], error: Exception) -> str:
    """Which override names a key that the config does not have, or cannot take."""
    from sim_jax import experiment

    for override in overrides:
        dotted = re.sub(r"--?(no)?config\.", "", override.split("=")[0])
        section: Any = config
        for part in dotted.split("."):
            if not isinstance(section, ConfigDict) or part not in section:
                return experiment.explain_unknown(config, dotted)
            section = section[part]
    return f"config: {error}"


def _start_processes(mode: str) -> None:
    """Joins the other processes, where there are any."""
    import jax

    several = (len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1 or int(os.environ.get("SLURM_NTASKS", "1")) > 1
               or int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1 or "JAX_COORDINATOR_ADDRESS" in os.environ)
    if mode == "on" or (mode == "auto" and several):
        jax.distributed.initialize()


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv if argv is None else argv)
    if any(a in ("-h", "--help", "--helpfull") for a in argv[1:]):
        print(f"{__doc__}\n{_flags(None, argv).get_help()}")
        return 0

    def work() -> int:
        config, values, overrides = _parse(argv)
        cli.use_compilation_cache()
        cli.keep_memory()
        cli.split_cpu()
        _start_processes(values.distributed)
        from sim_jax import train

        return train.run(config, values.workdir, command=cli.command_line("sim_jax.main", argv), overrides=overrides)

    return cli.guard(work)


if __name__ == "__main__":
    sys.exit(main())
