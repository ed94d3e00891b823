"""Trains a one-step generator by distillation, or a teacher.

    python -m sim_jax.main --config=configs/digits.py --workdir=runs/digits
    python -m sim_jax.main --config=configs/cifar10.py:cond --workdir=runs/cifar10 --config.batch_size=512

The same command again resumes. SIGTERM and SIGINT save first (exit codes 143 and 130). Bad input ends with one line and exit code 2,
training that diverged or a full disk with one line and exit code 1.
"""

from __future__ import annotations

import re
import sys

from absl import flags
from ml_collections import ConfigDict, config_flags

from sim_jax import cli, config_file, distributed

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
    distributed.define_flags(values)
    flags.DEFINE_string("init_from", None, "Weights that a fresh run's generator starts from, instead of its teacher's: the workdir of another "
                                           "run, or a file or directory of weights.", flag_values=values)
    flags.DEFINE_string("init_ema", None, "Which average of that workdir, e.g. ema_500k, or raw; default: its first.", flag_values=values)
    flags.DEFINE_string("init_networks", "generator", "What starts there: generator, or generator,fake_score.", flag_values=values)
    flags.DEFINE_bool("accept_changes", False, "Lets a workdir go on with another config, where its state fits; recorded in config.json.",
                      flag_values=values)
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
        raise ValueError(config_file.explain(config, overrides, error)) from None
    if positional:
        raise ValueError(f"arguments: got {positional[0]!r}, allowed: --config=FILE --workdir=FOLDER --config.KEY=VALUE")
    if not values.workdir:
        raise ValueError(f"--workdir: missing; usage: {_USAGE}")
    return config, values, overrides


def _process_flags(argv: list[str]) -> flags.FlagValues:
    """Those that say which process this is; all else is looked at once the processes are together."""
    values = flags.FlagValues()
    distributed.define_flags(values)
    try:
        values(argv, known_only=True)
    except flags.Error as error:
        raise ValueError(str(error)) from None
    return values


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv if argv is None else argv)
    if any(a in ("-h", "--help", "--helpfull") for a in argv[1:]):
        print(f"{__doc__}\n{_flags(None, argv).get_help()}")
        return 0

    def work() -> int:
        cli.use_compilation_cache()
        cli.keep_memory()
        cli.split_cpu()
        distributed.start(_process_flags(argv))
        config, values, overrides = distributed.together(lambda: _parse(argv))
        distributed.check_same("arguments", f"{config} {values.workdir}")
        from sim_jax import init_from, processes, train

        init = init_from.parse(values.init_from, values.init_ema, values.init_networks)
        code = train.run(config, values.workdir, command=cli.command_line("sim_jax.main", argv), overrides=overrides, init=init,
                         accept_changes=values.accept_changes)
        processes.meet("main/done")  # the first one may still be writing, and must not look lost to the others
        return code

    return cli.guard(work)


if __name__ == "__main__":
    sys.exit(main())
