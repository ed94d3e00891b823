"""A directory of embedded captions: what `sim_jax.data.embed_prompts` writes, and training reads.

    manifest.json                      format, encoder, width, max_tokens, count, truncated, prompts (their SHA-256), shards
    captions-00000-of-00003.array_record ...    a record a caption, in the order of the prompts
    null.array_record                  one record, the empty prompt

A record is `<IIII` (tokens n, bytes of the prompt, CRC-32 of what follows, 0), the prompt in UTF-8, and n x width bfloat16: only valid tokens
are stored, so that the mask is their number.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import struct
import threading
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

FORMAT = 1
MANIFEST, NULL = "manifest.json", "null.array_record"
_HEAD = struct.Struct("<IIII")
_OPEN = 256  # files that may stay open; systems allow 1024
_MANIFEST_KEYS = {"format": int, "encoder": str, "width": int, "max_tokens": int, "count": int, "shards": list}


def shard_name(number: int, count: int) -> str:
    return f"captions-{number:05d}-of-{count:05d}.array_record"


def pack(prompt: str, states: np.ndarray) -> bytes:
    """A record of a prompt and the states [n,D] of its valid tokens."""
    text, data = prompt.encode(), states.astype(ml_dtypes.bfloat16).tobytes()
    return _HEAD.pack(len(states), len(text), zlib.crc32(text + data), 0) + text + data


def unpack(record: bytes, width: int) -> tuple[str, np.ndarray]:
    """The prompt and its states [n,D] bfloat16. Raises: ValueError for a record that is not what `pack` made."""
    if len(record) < _HEAD.size:
        raise ValueError(f"a record of {len(record)} bytes")
    tokens, length, checksum, _ = _HEAD.unpack_from(record)
    body = record[_HEAD.size:]
    if len(body) != length + 2 * tokens * width or not tokens or zlib.crc32(body) != checksum:
        raise ValueError(f"a record whose checksum or size is wrong, of {len(record)} bytes")
    return body[:length].decode(), np.frombuffer(body, ml_dtypes.bfloat16, tokens * width, length).reshape(tokens, width)


def write_shard(path: pathlib.Path, records: Iterable[bytes]) -> None:
    """Writes records one by one readable, atomically: a file of that name is a whole one."""
    from array_record.python import array_record_module

    part = path.with_name(path.name + ".part")
    writer = array_record_module.ArrayRecordWriter(str(part), "group_size:1,uncompressed")
    for record in records:
        writer.write(record)
    writer.close()
    with open(part, "rb+") as file:
        os.fsync(file.fileno())
    part.replace(path)


class Shard:
    """Records of one file by number; safe to share between threads. `keep` leaves the file open between reads."""

    def __init__(self, path: pathlib.Path, count: int, *, keep: bool = False):
        self.path, self.count, self._keep = path, count, keep
        self._lock, self._reader = threading.Lock(), None

    def read(self, index: Sequence[int]) -> list[bytes]:
        """Raises: ValueError for a file that is missing, damaged or of another length."""
        from array_record.python import array_record_module

        with self._lock:
            try:
                if self._reader is None:
                    if not self.path.is_file():
                        raise ValueError("it does not exist")
                    reader = array_record_module.ArrayRecordReader(str(self.path), "readahead_buffer_size:0")
                    if reader.num_records() != self.count:
                        raise ValueError(f"{reader.num_records()} records instead of {self.count}")
                    self._reader = reader
                records = self._reader.read([int(i) for i in index])
                if not self._keep:
                    self._reader.close()
                    self._reader = None
                return records
            except (ValueError, RuntimeError, OSError, IndexError) as error:
                raise ValueError(f"{self.path} cannot be read ({_short(error)}); delete it and run embed_prompts again") from None


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


@dataclasses.dataclass(frozen=True, eq=False)
class EmbeddedCaptions:
    """Captions of a directory (see `captions.Captions`).

    Attributes:
      path: the directory.
      manifest: what its manifest.json holds.
      max_tokens: L, what captions are padded to.
    """

    path: pathlib.Path
    manifest: dict[str, Any]
    max_tokens: int

    width = property(lambda self: self.manifest["width"])
    encoder = property(lambda self: self.manifest["encoder"])
    prompts = property(lambda self: _Prompts(self))

    def __len__(self) -> int:
        return self.manifest["count"]

    @functools.cached_property
    def _shards(self) -> list[Shard]:
        entries = self.manifest["shards"]
        return [Shard(self.path / entry["file"], entry["count"], keep=len(entries) <= _OPEN) for entry in entries]

    @functools.cached_property
    def _starts(self) -> list[int]:
        return [0, *itertools.accumulate(entry["count"] for entry in self.manifest["shards"])]

    @functools.cached_property
    def null(self) -> np.ndarray:
        return self._unpack(Shard(self.path / NULL, 1), [0])[0][1][None]

    def _unpack(self, shard: Shard, index: Sequence[int]) -> list[tuple[str, np.ndarray]]:
        records = shard.read(index)
        try:
            return [unpack(record, self.width) for record in records]
        except ValueError as error:
            raise ValueError(f"{shard.path} cannot be read ({error}); delete it and run embed_prompts again") from None

    def records(self, index: Sequence[int] | np.ndarray) -> list[tuple[str, np.ndarray]]:
        """(prompt, states [n,D] bfloat16) of captions `index`. Raises: ValueError for a damaged shard."""
        out: list[Any] = [None] * len(index)
        where: dict[int, list[int]] = {}
        for place, i in enumerate(index):
            where.setdefault(bisect.bisect_right(self._starts, int(i)) - 1, []).append(place)
        for number, places in where.items():
            found = self._unpack(self._shards[number], [int(index[place]) - self._starts[number] for place in places])
            for place, record in zip(places, found, strict=True):
                out[place] = record
        return out

    def text(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Raises: ValueError for a damaged shard, or a caption that is longer than max_tokens."""
        states = np.zeros((len(index), self.max_tokens, self.width), ml_dtypes.bfloat16)
        mask = np.zeros(states.shape[:2], bool)
        for row, (prompt, tokens) in enumerate(self.records(index)):
            if len(tokens) > self.max_tokens:
                raise ValueError(f"text: got {len(tokens)} tokens of {prompt[:40]!r}, allowed: {self.max_tokens}")
            states[row, :len(tokens)], mask[row, :len(tokens)] = tokens, True
        return states, mask

    def padded(self, tokens: int) -> EmbeddedCaptions:
        """The same captions with L = `tokens`. Raises: ValueError where they were encoded with more."""
        if self.manifest["max_tokens"] > tokens:
            raise ValueError(f"got captions of up to {self.manifest['max_tokens']} tokens in {self.path}, allowed: {tokens}, what the network takes")
        return dataclasses.replace(self, max_tokens=tokens)


class _Prompts(Sequence):
    """The texts, read where they are asked for."""

    def __init__(self, captions: EmbeddedCaptions):
        self._captions = captions

    def __len__(self) -> int:
        return len(self._captions)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [prompt for prompt, _ in self._captions.records(range(*index.indices(len(self))))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._captions.records([index % len(self)])[0][0]


def read_manifest(path: pathlib.Path) -> dict[str, Any]:
    """A directory's manifest. Raises: ValueError for none, or one that is damaged."""
    if not path.is_dir() or not (path / MANIFEST).is_file():
        unfinished = ", whose embedding is not finished" if path.is_dir() and any(path.glob("*.array_record")) else ""
        raise ValueError(f"got {str(path)!r}{unfinished}, allowed: a directory that sim_jax.data.embed_prompts wrote")
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        bad = [key for key, kind in _MANIFEST_KEYS.items() if not isinstance(manifest.get(key), kind)]
        counted = sum(entry["count"] for entry in manifest["shards"]) if not bad else 0
        if bad or manifest["format"] != FORMAT or counted != manifest["count"] or counted < 1:
            raise ValueError(f"key {bad[0]!r}" if bad else f"format {manifest['format']}, {counted} of {manifest['count']} captions")
        if not all(pathlib.PurePath(entry["file"]).name == entry["file"] for entry in manifest["shards"]):
            raise ValueError("names of files outside the directory")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ValueError(f"{path / MANIFEST} is damaged ({_short(error)})") from None
    return manifest


def open_directory(path: str | pathlib.Path) -> EmbeddedCaptions:
    """The captions in a directory; every shard's size is checked, and its first and last record.

    Raises: ValueError for anything missing or damaged.
    """
    path = pathlib.Path(path)
    manifest = read_manifest(path)
    captions = EmbeddedCaptions(path, manifest, manifest["max_tokens"])
    for entry, start in zip(manifest["shards"], captions._starts):
        file = path / entry["file"]
        if not file.is_file() or file.stat().st_size != entry["bytes"]:
            size = f"{file.stat().st_size} bytes instead of {entry['bytes']}" if file.is_file() else "missing"
            raise ValueError(f"{file} is damaged ({size}); delete it and run embed_prompts again")
        captions.records([start, start + entry["count"] - 1])
    captions.null  # noqa: B018 - read now, so that it does not fail in the middle of a run
    return captions
