"""Files that are either the old one or the whole new one: written beside the target, then renamed over it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def make_folder(path: str | Path, *, key: str = "workdir") -> Path:
    """Makes `path` and its parents. Raises ValueError, naming `key`, where that is impossible."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{key}: got {str(path)!r}, allowed: a folder that can be written "
                         f"({error.strerror or error})") from error
    return path


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object], *,
                     key: str = "out") -> Path:
    """Calls `write(file)` on a temporary file beside `path`, then renames it over `path`.

    Whatever goes wrong (an exception, a full disk, a kill), `path` holds its old content or the new one.

    Args:
      path: the target; its folder is made where missing.
      write: gets the open binary file.
      key: what to call the target in the message, say "out" for `--out`.

    Returns: the target as a Path.
    Raises: ValueError where the target cannot be written at all; what `write` raises passes through.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    if path.is_dir():
        raise ValueError(f"{key}: got {str(path)!r}, a folder, allowed: a file to write")
    make_folder(path.parent, key=key)
    try:
        file = open(temporary, "wb")
    except OSError as error:
        raise ValueError(f"{key}: got {str(path)!r}, allowed: a file that can be written "
                         f"({error.strerror or error})") from error
    try:
        with file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path
