"""A reader of zip archives as `torch.save` writes them: members stored as they are, read in place, nothing extracted.

Refused: compressed or encrypted members, names that lead out of the archive, two members of one name or over the same bytes, and
archives in several parts. What is not compressed cannot grow, so a small file stays small. The exception is what TorchScript compresses,
its program under code/: it is listed, and not given.
"""

from __future__ import annotations

import struct

from sim_jax.convert.pickle_machine import Refused, show

_END, _END64, _LOCATOR64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_ENTRY, _LOCAL = b"PK\x01\x02", b"PK\x03\x04"
_MOST_MEMBERS = 100_000
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF


def members(data: memoryview) -> dict[str, memoryview]:
    """{name: bytes} of an archive; nothing of what is under NAME/code/. Raises: Refused."""
    try:
        return _members(data)
    except struct.error:
        raise Refused("is a zip archive that is cut off or damaged") from None


def _members(data: memoryview) -> dict[str, memoryview]:
    position, count = _directory(data)
    if count > _MOST_MEMBERS:
        raise Refused(f"is a zip archive of {count} members, allowed: at most {_MOST_MEMBERS}")
    out, taken = {}, []
    for _ in range(count):
        name, begin, size, position = _entry(data, position)
        if name in out:
            raise Refused(f"holds two members named {show(name)}")
        out[name] = data[begin:begin + size] if not _is_program(name) else data[:0]
        taken.append((begin, begin + size))
    taken.sort()
    if any(end > begin for (_, end), (begin, _) in zip(taken, taken[1:], strict=False)):
        raise Refused("holds members that overlap")
    return out


def _directory(data: memoryview) -> tuple[int, int]:
    """Where the central directory starts, and how many entries it has."""
    tail_begin = max(0, len(data) - 22 - _FULL16)
    at = bytes(data[tail_begin:]).rfind(_END)
    if at < 0:
        raise Refused("is a zip archive without an end: cut off or damaged")
    at += tail_begin
    disk, _, here, count, _, offset, _ = struct.unpack_from("<4H2IH", data, at + 4)
    if at >= 20 and bytes(data[at - 20:at - 16]) == _LOCATOR64:
        end64 = struct.unpack_from("<IQI", data, at - 16)[1]
        if end64 + 56 > len(data) or bytes(data[end64:end64 + 4]) != _END64:
            raise Refused("is a zip archive that is cut off or damaged")
        disk, _, here, count, _, offset = struct.unpack_from("<2I4Q", data, end64 + 16)
    if disk or here != count:
        raise Refused("is one part of a zip archive in several parts")
    return offset, count


def _entry(data: memoryview, position: int) -> tuple[str, int, int, int]:
    """One entry of the central directory: name, where its bytes begin, how many, and where the next entry is."""
    if bytes(data[position:position + 4]) != _ENTRY:
        raise Refused("is a zip archive that is cut off or damaged")
    (_, _, flags, method, _, _, _, packed, size, name_size, extra_size, comment_size, _, _, _, local) = struct.unpack_from(
        "<6H3I5H2I", data, position + 4)
    begin = position + 46
    raw_name = bytes(data[begin:begin + name_size])
    extra = bytes(data[begin + name_size:begin + name_size + extra_size])
    size, packed, local = _sizes64(extra, size, packed, local)
    name = _safe_name(raw_name)
    if flags & 1:
        raise Refused(f"holds {show(name)}, which is encrypted")
    if (method != 0 or packed != size) and not _is_program(name):
        raise Refused(f"holds {show(name)}, which is compressed; torch.save stores members as they are")
    if bytes(data[local:local + 4]) != _LOCAL:
        raise Refused(f"is a zip archive in which {show(name)} is not where the directory says")
    local_name, local_extra = struct.unpack_from("<2H", data, local + 26)
    start = local + 30 + local_name + local_extra
    if bytes(data[local + 30:local + 30 + local_name]) != raw_name:
        raise Refused(f"is a zip archive in which {show(name)} has two names")
    if start + packed > len(data):
        raise Refused(f"is cut off: {show(name)} should have {packed} bytes")
    return name, start, packed, begin + name_size + extra_size + comment_size


def _is_program(name: str) -> bool:
    return name.split("/")[1:2] == ["code"]


def _sizes64(extra: bytes, *sizes: int) -> list[int]:
    """Sizes that do not fit into 32 bits stand in an extra field, in order."""
    wide: list[int] = []
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        if kind == 1:
            wide = list(struct.unpack_from(f"<{length // 8}Q", extra, position + 4))
        position += 4 + length
    if sum(size == _FULL32 for size in sizes) > len(wide):
        raise Refused("is a zip archive that is cut off or damaged")
    return [wide.pop(0) if size == _FULL32 else size for size in sizes]


def _safe_name(raw: bytes) -> str:
    name = raw.decode("utf-8", "replace")
    parts = name.replace("\\", "/").split("/")
    if not name or name.startswith(("/", "\\")) or ".." in parts or "\0" in name or ":" in parts[0]:
        raise Refused(f"holds a member named {show(name)}, which leads out of the archive")
    return name
