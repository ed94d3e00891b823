"""A disk that is full, or gone: one line that says so, instead of whatever the library that met it raised."""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

_REASONS = {
    errno.ENOSPC: "no space left on the device", errno.EDQUOT: "disk quota exceeded", errno.EFBIG: "file size limit exceeded",
    errno.EIO: "input/output error", errno.EROFS: "the file system is read-only",
}
# What the same conditions are called where a library keeps the text alone (tensorstore).
_TEXTS = {
    "No space left on device": errno.ENOSPC, "ENOSPC": errno.ENOSPC, "Disk quota exceeded": errno.EDQUOT, "EDQUOT": errno.EDQUOT,
    "File too large": errno.EFBIG, "EFBIG": errno.EFBIG, "Input/output error": errno.EIO, "Read-only file system": errno.EROFS,
}


class StorageError(Exception):
    """One line for the user."""


def reason(error: BaseException | None) -> str | None:
    """What is wrong with the disk, if that is what `error`, or what led to it, says."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        if isinstance(error, OSError) and error.errno in _REASONS:
            return _REASONS[error.errno]
        found = next((number for text, number in _TEXTS.items() if text in str(error)), None)
        if found is not None:
            return _REASONS[found]
        seen.append(error)
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def explained(workdir: Path, newest: Callable[[], int | None]) -> Iterator[None]:
    """Raises StorageError, with what is left to resume from, for anything inside that fails for the disk's sake.

    Args:
      workdir: whose disk it is.
      newest: gives the newest complete checkpoint.
    """
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if reason(args.exc_value) is None:  # else the main thread meets the same and says it
            before(args)

    threading.excepthook = hook
    try:
        yield
    except Exception as error:
        why = reason(error)
        if why is None or isinstance(error, StorageError):
            raise
        step = newest()
        left = "no checkpoint was complete" if step is None else f"the checkpoint of step {step} is complete"
        raise StorageError(f"{workdir}: {why}; {left}; make room, and the same command resumes") from error
    finally:
        threading.excepthook = before
