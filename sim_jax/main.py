"""Trains a one-step generator by distillation, or a teacher.

    python -m sim_jax.main --config=configs/digits.py --workdir=runs/digits
    python -m sim_jax.main --config=configs/cifar10.py:cond --workdir=runs/cifar10 --config.batch_size=512

The same command again resumes. SIGTERM and SIGINT save first (exit codes 143 and 130). Bad input ends with one line and exit code 2.
"""

from __future__ import annotations

import os
import pathlib
import sys

from absl import flags
from ml_collections import ConfigDict, config_flags

from sim_jax import cli

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, with its argument after a colon: configs/cifar10.py:cond",
                                          lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, figures, pictures and the report.")
_DISTRIBUTED = flags.DEFINE_enum("distributed", "auto", ["auto", "on", "off"],
                                 "Several processes: found by TPU pods, SLURM and Open MPI; 'on' insists.")


def _parse(argv: list[str]) -> tuple[ConfigDict, str, list[str]]:
    """Flags -> (config, workdir, overrides). Raises ValueError for anything wrong in them."""
    overrides = [a for a in argv[1:] if a.startswith(("--config.", "-config."))]
    named = [a.split("=", 1)[1] for a in argv[1:] if a.startswith(("--config=", "-config="))]
    if named:
        file = pathlib.Path(named[-1].split(":", 1)[0])
        if not file.is_file():
            raise ValueError(f"--config: got {named[-1]!r}, but {file} is no file; allowed: a config such as configs/digits.py")
        sys.path.insert(0, str(file.resolve().parents[1]))  # for `from configs import common`
    try:
        rest = flags.FLAGS(argv)
        config = _CONFIG.value
    except flags.Error as error:
        raise ValueError(" ".join(str(error).split())) from None
    except (AttributeError, KeyError) as error:
        raise ValueError(_explain_key(argv, error)) from None
    except (TypeError, SyntaxError, ImportError) as error:
        raise ValueError(f"--config: {type(error).__name__}: {' '.join(str(error).split())}") from None
    if len(rest) > 1:
        raise ValueError(f"arguments: got {rest[1]!r}, allowed: --config=... --workdir=... --config.KEY=VALUE")
    for flag, value in (("--config", config), ("--workdir", _WORKDIR.value)):
        if not value:
            raise ValueError(f"{flag}: missing; usage: python -m sim_jax.main --config=configs/digits.py --workdir=runs/digits")
    return config, _WORKDIR.value, overrides


def _explain_key(argv: list[str], error: Exception) -> str:
    """Which override named a key that the config does not have."""
    from sim_jax import experiment

    plain = [a for a in argv if not a.startswith(("--config.", "-config."))]
    try:
        flags.FLAGS.unparse_flags()
        flags.FLAGS(plain)
        config = _CONFIG.value
    except Exception:  # the config file itself is at fault
        return f"--config: {type(error).__name__}: {' '.join(str(error).split())}"
    for override in (a.lstrip("-").split("=")[0] for a in argv if a.startswith(("--config.", "-config."))):
        dotted = override.removeprefix("config.")
        section = config
        for part in dotted.split("."):
            if not isinstance(section, ConfigDict) or part not in section:
                return experiment.explain_unknown(config, dotted)
            section = section[part]
    return f"--config: {' '.join(str(error).split())}"


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
        print(__doc__)
        print(flags.FLAGS.get_flags_for_module(sys.modules[__name__]) and flags.FLAGS.module_help(sys.modules[__name__]))
        return 0

    def work() -> int:
        config, workdir, overrides = _parse(argv)
        cli.use_compilation_cache()
        _start_processes(_DISTRIBUTED.value)
        from sim_jax import train

        return train.run(config, workdir, command=cli.command_line("sim_jax.main", argv), overrides=overrides)

    return cli.guard(work)


if __name__ == "__main__":
    sys.exit(main())
