"""safetensors files, memory-mapped for reading and written tensor by tensor.

    8 bytes: length n of the header   n bytes: JSON {name: {dtype, shape, data_offsets}, "__metadata__": {text: text}}   the numbers

Reading gives views of the file: nothing is in memory until it is used, and then only the parts that are. Writing takes the memory
of one tensor.
"""

from __future__ import annotations

import json
import math
import mmap
import pathlib
import stat
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

_TYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64, "I32": np.int32,
          "I16": np.int16, "I8": np.int8, "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_}
_NAMES = {np.dtype(kind): name for name, kind in _TYPES.items()}
_LARGEST_HEADER = 16 << 20


def map_file(path: str | pathlib.Path) -> memoryview:
    """A file's bytes, mapped read-only. Raises: ValueError for what is no regular file, without opening it."""
    try:
        status = pathlib.Path(path).stat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path}: is not a regular file")
        if not status.st_size:
            raise ValueError(f"{path}: is empty")
        with open(path, "rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None


def is_safetensors(path: str | pathlib.Path) -> bool:
    """Whether a file starts as safetensors do, with a JSON object behind a length. Raises: ValueError as `map_file`."""
    data = map_file(path)
    return len(data) > 8 and bytes(data[8:9]) == b"{" and int.from_bytes(data[:8], "little") < 1 << 40


def read(path: str | pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """({name: read-only view of the file}, metadata).

    Raises: ValueError for what is no safetensors file: damaged, cut off, or tensors that overlap or leave gaps.
    """
    data = map_file(path)
    try:
        return _parse(data)
    except ValueError as error:
        raise ValueError(f"{path}: not a safetensors file: {error}") from None


def _parse(data: memoryview) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    size = int.from_bytes(data[:8], "little")
    if len(data) < 10 or size > min(_LARGEST_HEADER, len(data) - 8):
        raise ValueError(f"its header should have {size} bytes, the file has {len(data)}")
    header = _json(bytes(data[8:8 + size]))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its metadata is not text")
    body, out, spans = data[8 + size:], {}, []
    for name, entry in header.items():
        dtype, shape, begin, end = _entry(name, entry)
        if end > len(body):
            raise ValueError(f"it is cut off: {ascii(name)} ends at byte {end} of {len(body)}")
        spans.append((begin, end))
        out[name] = np.frombuffer(body[begin:end], dtype).reshape(shape)
    spans.sort()
    ends = [0, *(end for _, end in spans)]
    if any(begin != end for (begin, _), end in zip(spans, ends, strict=False)) or ends[-1] != len(body):
        raise ValueError("its tensors overlap or leave gaps")
    return out, metadata


def _json(raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) < len(pairs):
            raise ValueError("its header names something twice")
        return out

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("its header is nested too deeply") from None
    if not isinstance(header, dict):
        raise ValueError("its header is not an object")
    return header


def _entry(name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    def whole(values: Any, most: int) -> bool:
        return isinstance(values, list) and len(values) <= most and all(type(v) is int and 0 <= v < 1 << 48 for v in values)

    if not isinstance(entry, dict) or not whole(entry.get("shape"), 8) or not whole(entry.get("data_offsets"), 2) \
            or len(entry["data_offsets"]) != 2:
        raise ValueError(f"the header's entry for {ascii(name)[:100]} has no valid shape and offsets")
    if not isinstance(entry.get("dtype"), str) or entry["dtype"] not in _TYPES:
        raise ValueError(f"{ascii(name)[:100]} has type {ascii(entry.get('dtype'))[:20]}, allowed: {', '.join(_TYPES)}")
    dtype, shape, (begin, end) = np.dtype(_TYPES[entry["dtype"]]), tuple(entry["shape"]), entry["data_offsets"]
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{ascii(name)[:100]} has {end - begin} bytes, its shape {shape} takes {math.prod(shape) * dtype.itemsize}")
    return dtype, shape, begin, end


def write(file: BinaryIO, state: Mapping[str, np.ndarray], *, dtype: str | None = None, metadata: Mapping[str, str] | None = None,
          progress: Callable[[int], None] | None = None) -> None:
    """Writes a state.

    Args:
      state: {name: array}.
      dtype: what to store all of them as; None leaves each as it is.
      metadata: text by name.
      progress: called with the number of bytes written.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name in sorted(state):
        kind = np.dtype(dtype or state[name].dtype)
        end = position + state[name].size * kind.itemsize
        header[name] = {"dtype": _NAMES[kind], "shape": list(state[name].shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    file.write(len(raw).to_bytes(8, "little") + raw)
    written = 0
    for name in sorted(state):
        written += file.write(as_bytes(state[name], dtype))
        if progress is not None:
            progress(written)


def as_bytes(array: np.ndarray, dtype: str | None = None) -> memoryview:
    """The array's bytes in row-major order, copied only where type or order differ."""
    return np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8).data
