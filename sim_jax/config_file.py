"""Config files: FILE.py:words -> a locked ConfigDict, and keys set on the command line."""

from __future__ import annotations

import difflib
import importlib.util
import pathlib
import re
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags


def load_module(name: str) -> ModuleType:
    """The module of "FILE.py:words". Raises ValueError if it is no Python file or cannot be run."""
    path = name.partition(":")[0]
    file = pathlib.Path(path)
    if not file.is_file() or file.suffix != ".py":
        raise ValueError(f"--config: got {name!r}, but {path} is no Python file; allowed: a config such as configs/digits.py")
    folder = str(file.resolve().parents[1])
    if folder not in sys.path:
        sys.path.insert(0, folder)  # for `from configs import common`
    try:
        spec = importlib.util.spec_from_file_location("sim_jax_config", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ValueError as error:
        raise ValueError(f"--config: {path}: {error}") from error
    except Exception as error:  # whatever a file that is no config raises
        raise ValueError(f"--config: {path}: {type(error).__name__}: {error}") from error
    return module


def load(name: str) -> ConfigDict:
    """What `get_config` of "FILE.py:words" returns. Raises ValueError if that fails."""
    path, colon, words = name.partition(":")
    module = load_module(name)
    try:
        config = module.get_config(words) if colon else module.get_config()
    except ValueError as error:
        raise ValueError(f"--config: {path}: {error}") from error
    except Exception as error:  # whatever a file that is no config raises
        raise ValueError(f"--config: {path}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise ValueError(f"--config: {path}: get_config returned {type(config).__name__}, allowed: ConfigDict")
    return config.lock()


def override(config: ConfigDict, arguments: Sequence[str]) -> list[str]:
    """Sets `--config.KEY=VALUE` on `config`, in place.

    Args:
      config: locked: only keys that it has, and values of their types.
      arguments: of the command line; nothing else than overrides may be among them.
    Returns: the overrides. Raises ValueError for a key that does not exist, a value it cannot take, or anything else.
    """
    others = [a for a in arguments if not re.match(r"--?(no)?config\.", a)]
    if others:
        raise ValueError(f"arguments: got {others[0]!r}, allowed: those of --help, and --config.KEY=VALUE")
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=list(arguments))
        values(["", *arguments])
    except flags.Error as error:
        raise ValueError(str(error)) from None
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(explain(config, arguments, error)) from None
    return list(arguments)


def explain(config: ConfigDict, overrides: Sequence[str], error: Exception) -> str:
    """Which override names a key that `config` does not have, or cannot take."""
    for argument in overrides:
        dotted = re.sub(r"--?(no)?config\.", "", argument.split("=")[0])
        section: Any = config
        path = dotted.split(".")
        for i, part in enumerate(path):
            allowed = sorted(section) if isinstance(section, ConfigDict) else []
            if part not in allowed:
                close = difflib.get_close_matches(part, allowed, 1)
                hint = f" (did you mean {'.'.join([*path[:i], close[0]])!r}?)" if close else ""
                where = f"config.{'.'.join(path[:i])}" if i else "config"
                return f"config.{dotted}: unknown key{hint}; allowed in {where}: {', '.join(allowed)}"
            section = section[part]
    return f"config: {error}"
