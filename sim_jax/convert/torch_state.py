"""Reads what PyTorch writes, without PyTorch: pickles with modules and tensors inside, and `torch.save`'s two formats.

    a pickle                   EDM's network-*.pkl: persistent objects (their source code is skipped) and, per storage, bytes in
                               the legacy format
    torch.save, zip            archive/data.pkl, one member per storage, each stored uncompressed
    torch.save, legacy         five pickles (magic number, version, machine, the object, storage keys), then the storages
    torch.jit.save             the zip format with objects of the program's classes; the program itself is not read

The file is memory-mapped; tensors are views of the map, so reading takes no memory of the tensors' size. Nothing in the file is
executed: `pickle_machine` knows the names in the tables of `torch_names`, and refuses every other one by name.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from sim_jax import tensor_file
from sim_jax.convert import zip_members
from sim_jax.convert.pickle_machine import Budget, Machine, Name, Record, Refused, show
from sim_jax.convert.torch_names import STORAGES, Storage, constructors, never

_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001
PROGRAM = "__torch__."
_PROGRAMS = (PROGRAM, "torch.jit._pickle.")


class _WithPrograms(dict):
    """Constructors, and in addition every class of a TorchScript program as an inert Record."""

    def __contains__(self, kind: object) -> bool:
        return super().__contains__(kind) or (isinstance(kind, str) and kind.startswith(_PROGRAMS))

    def __missing__(self, kind: str) -> Callable[[tuple], Record]:
        return lambda args: Record(kind, args)


def read(path: str | pathlib.Path, *, classes: Collection[str] = (), torchscript: bool = False) -> Any:
    """What a .pkl, .pt, .pth or .bin file holds: dicts, lists, Tensors and inert Records; of safetensors, a dict of arrays.

    Args:
      classes: "module.name" of more classes whose objects become inert Records.
      torchscript: take what torch.jit.save writes, too: Records of kind "__torch__.NAME", attributes as their state.
    Raises: ValueError, in one line that begins with the path, for anything but the formats above.
    """
    if tensor_file.is_safetensors(path):
        return tensor_file.read(path)[0]
    data = tensor_file.map_file(path)
    try:
        return _read(data, Budget(), classes, torchscript)
    except Refused as error:
        raise ValueError(f"{path}: {error}") from None


def _read(data: memoryview, budget: Budget, classes: Collection[str], torchscript: bool) -> Any:
    names = {**_names(budget), **{kind: lambda args, kind=kind: Record(kind, args) for kind in classes}}
    if bytes(data[:4]) == b"PK\x03\x04":
        return _read_zip(data, _WithPrograms(names) if torchscript else names, budget)
    if data[0] != 0x80:
        raise Refused("is neither a pickle nor written by torch.save nor safetensors")
    machine = Machine(data, 0, names, None, budget)
    value = machine.run()
    if value == _MAGIC:
        return _read_legacy(data, machine.position, names, budget)
    if machine.position != len(data):
        raise Refused(f"has {len(data) - machine.position} bytes behind the end of its pickle")
    return value


def _read_zip(data: memoryview, names: Mapping[str, Callable], budget: Budget) -> Any:
    members = zip_members.members(data)
    roots = [name.removesuffix("data.pkl") for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise Refused(f"is a zip archive with {len(roots)} members named data.pkl; torch.save writes one")
    root = roots[0]
    program = root + "constants.pkl" in members or any(name.startswith(root + "code/") for name in members)
    if program and not isinstance(names, _WithPrograms):
        raise Refused("is a TorchScript program (it holds constants.pkl or code/), not a state dict")
    order = bytes(members.get(root + "byteorder", b"little"))[:16]
    if order != b"little":
        raise Refused(f"has byte order {order!r}, allowed: little")
    storages: dict[str, Storage] = {}

    def load(dtype: np.dtype, key: str, count: int) -> Storage:
        member = f"{root}data/{key}"
        if member not in members:
            raise Refused(f"has no member {show(member)}, which a tensor refers to")
        if len(members[member]) != count * dtype.itemsize:
            raise Refused(f"has {len(members[member])} bytes in {show(member)}, but {count} numbers of type {dtype} are announced")
        return storages.setdefault(key, Storage(dtype, count, members[member]))

    machine = Machine(members[root + "data.pkl"], 0, names, _persistent(storages, load), budget)
    return machine.run()


def _read_legacy(data: memoryview, position: int, names: Mapping[str, Callable], budget: Budget) -> Any:
    storages: dict[str, Storage] = {}

    def step(table: Mapping[str, Callable], persistent: Callable | None = None) -> Any:
        nonlocal position
        machine = Machine(data, position, table, persistent, budget)
        value = machine.run()
        position = machine.position
        return value

    version, system = step({}), step({})
    if version != _VERSION or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Refused("is in a legacy format of torch.save other than version 1001, little-endian")
    value = step(names, _persistent(storages, lambda dtype, key, count: storages.setdefault(key, Storage(dtype, count))))
    keys = step({})
    if not isinstance(keys, list) or set(map(str, keys)) != set(storages) or len(keys) != len(storages):
        raise Refused("lists other storages than its tensors refer to")
    for key in keys:
        storage = storages[str(key)]
        size = storage.count * storage.dtype.itemsize
        count = int.from_bytes(data[position:position + 8], "little", signed=True)
        if count != storage.count or position + 8 + size > len(data):
            raise Refused(f"has a storage of {count} numbers where {storage.count} are announced, or is cut off")
        storage.data = data[position + 8:position + 8 + size]
        position += 8 + size
    if position != len(data):
        raise Refused(f"has {len(data) - position} bytes behind its last storage")
    return value


def _persistent(storages: Mapping[str, Storage], load: Callable[[np.dtype, str, int], Storage]) -> Callable[[Any], Storage]:
    def resolve(pid: Any) -> Storage:
        fields = pid if isinstance(pid, tuple) and len(pid) in (5, 6) and (len(pid) == 5 or pid[5] is None) else ()
        match fields:
            case ("storage", Name(kind=kind), str(key), str(), int(count), *_) if kind in STORAGES and count >= 0:
                storage = load(STORAGES[kind], key, count)
                if (storage.dtype, storage.count) != (STORAGES[kind], count):
                    raise Refused(f"describes storage {show(key)} in two ways")
                return storage
        raise Refused("has a persistent id that is not a storage of torch.save")

    return resolve


def _names(budget: Budget) -> dict[str, Callable[[tuple], Any]]:
    return constructors(budget, lambda args: _embedded_storage(args, budget))


def _embedded_storage(args: tuple, budget: Budget) -> Storage:
    """A storage that `torch.save` wrote into a byte string of the pickle; in there, nothing but storages may be named."""
    data = args[0] if len(args) == 1 else None
    if isinstance(data, bytes):
        data = memoryview(data)
    if not isinstance(data, memoryview) or not len(data):
        raise Refused("loads a storage from something other than bytes")
    names = {kind: never(kind) for kind in STORAGES}
    if bytes(data[:4]) == b"PK\x03\x04":
        storage = _read_zip(data, names, budget)
    else:
        machine = Machine(data, 0, {}, None, budget)
        if machine.run() != _MAGIC:
            raise Refused("holds a storage that torch.save did not write")
        storage = _read_legacy(data, machine.position, names, budget)
    if not isinstance(storage, Storage):
        raise Refused("holds something other than a storage where a tensor's storage should be")
    return storage
