"""Read-only access to the files of a ZIP archive or a folder, refusing what is broken or hostile.

Both kinds have `names` (sorted, with `/`), `read(name) -> bytes` and `where` (the path, for messages).
Members are only read into memory, never extracted; names that would leave the archive and members that
declare an absurd size are refused all the same, as whoever built such a file meant harm.
"""

from __future__ import annotations

import os
import pathlib
import threading
import zipfile
import zlib

MAX_FILE_BYTES = 1 << 26    # 64 MiB: a 4096x4096 RGB image, uncompressed, is 48 MiB
MAX_INDEX_BYTES = 1 << 30   # dataset.json: about 40 bytes an image
INDEX = "dataset.json"

_READ_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError)


def _check_member(where: str, name: str, size: int):
    """Raises ValueError for a name that points outside the archive or a size no image has."""
    if name.startswith("/") or "\\" in name or ":" in name.split("/")[0] or ".." in name.split("/"):
        raise ValueError(f"path: got the member {name!r} in {where}, "
                         f"allowed: relative names with '/' and without '..'")
    limit = MAX_INDEX_BYTES if name == INDEX else MAX_FILE_BYTES
    if size > limit:
        raise ValueError(f"path: got {size} bytes declared by {name!r} in {where}, allowed: at most {limit}")


def _is_hidden(name: str) -> bool:
    """Bookkeeping of file managers and version control, which EDM's own tools never write."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


class Folder:
    """All files below a folder."""

    def __init__(self, path: str):
        self.where = str(path)
        self._root = pathlib.Path(path)
        found = [(pathlib.Path(folder) / file).relative_to(self._root).as_posix()
                 for folder, _, files in os.walk(self._root) for file in files]
        self.names = sorted(name for name in found if not _is_hidden(name))

    def read(self, name: str) -> bytes:
        try:
            file = self._root / name
            _check_member(self.where, name, file.stat().st_size)
            return file.read_bytes()
        except OSError as error:
            raise ValueError(f"path: cannot read {name!r} in {self.where} ({error})") from error


class Zip:
    """The members of a ZIP archive; safe to share between threads, to pickle and to use after a fork."""

    def __init__(self, path: str):
        self.where = str(path)
        self._lock = threading.Lock()
        self._file, self._pid = None, None
        members = [info for info in self._open().infolist() if not info.is_dir()]
        for info in members:
            _check_member(self.where, info.filename, info.file_size)
        self.names = sorted(info.filename for info in members if not _is_hidden(info.filename))
        for first, second in zip(self.names, self.names[1:]):
            if first == second:
                raise ValueError(f"path: got {first!r} twice in {self.where}, allowed: each name once")

    def _open(self) -> zipfile.ZipFile:
        # A file position is shared with forked children, so each process opens its own.
        with self._lock:
            if self._pid != os.getpid():
                try:
                    self._file, self._pid = zipfile.ZipFile(self.where), os.getpid()
                except _READ_ERRORS as error:
                    raise ValueError(f"path: {self.where} is not a readable zip file, it may be truncated or "
                                     f"corrupt ({error})") from error
            return self._file

    def read(self, name: str) -> bytes:
        try:
            return self._open().read(name)
        except _READ_ERRORS as error:
            raise ValueError(f"path: cannot read {name!r} in {self.where}, the zip file may be truncated or "
                             f"corrupt ({error})") from error

    def __getstate__(self):
        return {**self.__dict__, "_file": None, "_pid": None, "_lock": None}

    def __setstate__(self, state):
        self.__dict__.update(state, _lock=threading.Lock())


def open_archive(path: str | os.PathLike) -> Folder | Zip:
    """Opens a folder or a .zip file.

    Raises:
      ValueError: the path is missing or of another kind; the zip is truncated, corrupt or hostile.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        return Folder(path)
    if os.path.isfile(path) and path.lower().endswith(".zip"):
        return Zip(path)
    state = "which is neither" if os.path.exists(path) else "which does not exist"
    raise ValueError(f"path: got {path!r}, {state}, allowed: a folder of images or a .zip file")
