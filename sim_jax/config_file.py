"""Config files: FILE.py:words -> a locked ConfigDict."""

from __future__ import annotations

import importlib.util
import pathlib
import sys
from types import ModuleType

from ml_collections import ConfigDict


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
