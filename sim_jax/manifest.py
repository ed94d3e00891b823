"""What a checkpoint must hold, byte for byte: size and SHA-256 of each of its files, in its MANIFEST.json.

The manifest is written into the folder while that still has its temporary name, so one rename commits both: a step that has its
final name has a manifest. Everything is flushed to the disk before, so that this holds after a power failure too.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sim_jax import files

FILE_NAME = "MANIFEST.json"
MISSING = f"it has no {FILE_NAME}"
_FORMAT, _ALGORITHM = 1, "sha256"
_WRITTEN_LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")  # by orbax while it commits; nothing of ours is in there, and none is read
_PIECE, _THREADS = 1 << 22, 4  # hashing lets other threads run


def _digest(path: Path, *, flush: bool = False) -> tuple[int, str]:
    """(bytes, hash) of a file, read in pieces; `flush` has it on the disk afterwards."""
    digest, size = hashlib.new(_ALGORITHM), 0
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
            size += len(piece)
        if flush:
            os.fsync(file.fileno())
    return size, digest.hexdigest()


def _files(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in (FILE_NAME, *_WRITTEN_LATER):
            yield name


def flush_folder(folder: Path) -> None:
    """Has the names in a folder on the disk, where the file system can."""
    try:
        number = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(number)
    except OSError:
        pass
    finally:
        os.close(number)


def write(folder: Path, step: int) -> None:
    """Writes the manifest of what is in `folder`. Raises: OSError, as for a full disk."""
    names = list(_files(folder))
    with ThreadPoolExecutor(_THREADS) as pool:
        contents = list(pool.map(lambda name: _digest(folder / name, flush=True), names))
    for path in (p for p in folder.rglob("*") if p.is_dir()):
        flush_folder(path)
    manifest = {"format": _FORMAT, "step": step, "algorithm": _ALGORITHM, "files": dict(zip(names, contents, strict=True))}
    text = json.dumps(manifest, indent=0).encode() + b"\n"
    files.write_atomically(folder / FILE_NAME, lambda file: file.write(text))
    flush_folder(folder)


def verify(folder: Path) -> str | None:
    """Why the checkpoint in `folder`, named by its step, is not what was saved; None if it is. Streams through all of it."""
    path = folder / FILE_NAME
    if not path.is_file():
        return MISSING
    try:
        manifest = json.loads(path.read_bytes())
        step, expected = manifest["step"], {name: (int(size), str(digest)) for name, (size, digest) in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return f"{FILE_NAME} cannot be read"
    if manifest.get("format") != _FORMAT or manifest.get("algorithm") != _ALGORITHM:
        return f"{FILE_NAME} is of format {manifest.get('format')!r} ({manifest.get('algorithm')!r}), not {_FORMAT} ({_ALGORITHM!r})"
    if str(step) != folder.name:
        return f"{FILE_NAME} is that of step {step}"
    for name, (size, _) in expected.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (folder / name).stat().st_size != size:
            return f"{name} has {(folder / name).stat().st_size} bytes instead of {size}"

    def compare(name: str) -> str | None:
        try:
            return None if _digest(folder / name) == expected[name] else f"the content of {name} has changed"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or error})"

    with ThreadPoolExecutor(_THREADS) as pool:
        return next(filter(None, pool.map(compare, expected)), None)
