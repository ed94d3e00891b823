"""The constructors that a checkpoint's pickle may name, and what they make here: numbers, containers, tensors, inert records.

Everything that PyTorch's and EDM's pickles need is in this table, and nothing else can be asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from sim_jax.convert.pickle_machine import Budget, Record, Refused, show

_TYPES = {"Float": np.float32, "Half": np.float16, "BFloat16": ml_dtypes.bfloat16, "Double": np.float64, "Long": np.int64,
          "Int": np.int32, "Short": np.int16, "Char": np.int8, "Byte": np.uint8, "Bool": np.bool_}
STORAGES = {f"torch.{name}Storage": np.dtype(kind) for name, kind in _TYPES.items()}
_SCALARS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")
_TORCH_TYPES = ("float16", "float32", "float64", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
_CONTAINERS = ("ModuleDict", "ModuleList", "Sequential", "ParameterDict", "ParameterList")
PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"


class Storage:
    """Numbers in a row; `data` is filled in where they come later in the file."""

    __slots__ = ("count", "data", "dtype")

    def __init__(self, dtype: np.dtype, count: int, data: memoryview | None = None):
        self.dtype, self.count, self.data = dtype, count, data


class Tensor(NamedTuple):
    """A strided view of a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.storage.dtype.itemsize

    def array(self) -> np.ndarray:
        """The numbers, a view of the file. Raises: Refused where they would not lie inside of the storage."""
        storage, size = self.storage, self.storage.dtype.itemsize
        if storage.data is None or len(storage.data) != storage.count * size:
            raise Refused(f"holds a tensor {self.shape} whose storage does not have the {storage.count} numbers that it should")
        # Fewer numbers than the storage has: a small file cannot describe a huge array by strides of zero.
        count = math.prod(self.shape)
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        if count and (count > storage.count or last >= storage.count):
            raise Refused(f"holds a tensor {self.shape} at {self.offset} with strides {self.strides}, which leads out of its storage "
                          f"of {storage.count} numbers")
        if not count:
            return np.empty(self.shape, storage.dtype)
        return np.ndarray(self.shape, storage.dtype, storage.data, self.offset * size, [s * size for s in self.strides])


def constructors(budget: Budget, load_storage: Callable[[tuple], Storage]) -> dict[str, Callable[[tuple], Any]]:
    """{"module.name": function of the arguments}; `load_storage` reads bytes that `torch.save` wrote."""
    records = [f"torch.nn.modules.container.{name}" for name in _CONTAINERS]
    records += ["numpy.ndarray", *(f"torch.{name}" for name in _TORCH_TYPES)]
    table = {kind: _record(kind) for kind in records} | {kind: never(kind) for kind in STORAGES}
    table.update({
        PERSISTENT: _persistent_object,
        "collections.OrderedDict": _mapping(budget), "dnnlib.util.EasyDict": _mapping(budget), "builtins.dict": _mapping(budget),
        "builtins.set": _members_of(budget), "__builtin__.set": _members_of(budget), "_codecs.encode": _encode,
        "torch.device": lambda args: str(args[0]) if args and isinstance(args[0], str) else None,
        "torch.Size": lambda args: args[0] if args and isinstance(args[0], tuple) else (),
        "torch._utils._rebuild_tensor_v2": _tensor,
        "torch._utils._rebuild_parameter": _parameter, "torch._utils._rebuild_parameter_with_state": _parameter,
        "torch.storage._load_from_bytes": load_storage,
        "numpy.dtype": _record("numpy.dtype"),
    })
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        table[f"{module}.scalar"] = _scalar
        table[f"{module}._reconstruct"] = lambda args: Record("numpy.ndarray")
    return table


def _record(kind: str) -> Callable[[tuple], Record]:
    return lambda args: Record(kind, args)


def never(kind: str) -> Callable[[tuple], Any]:
    def refuse(args: tuple) -> Any:
        raise Refused(f"calls {kind}, which may only be named")

    return refuse


def _persistent_object(args: tuple) -> Record:
    """{class_name, state, module_src, ...}: the source is dropped unread."""
    meta = args[0] if len(args) == 1 else None
    if not isinstance(meta, dict) or meta.get("type") != "class" or not isinstance(meta.get("class_name"), str):
        raise Refused("holds a persistent object that is not EDM's {type, version, class_name, state}")
    if not isinstance(meta.get("state"), dict):
        raise Refused(f"holds a persistent {show(meta['class_name'])} without a state")
    record = Record(PERSISTENT, (meta["class_name"],))
    record.state = meta["state"]
    return record


def _mapping(budget: Budget) -> Callable[[tuple], dict]:
    def make(args: tuple) -> dict:
        if args and not (len(args) == 1 and isinstance(args[0], dict)):
            raise Refused("builds a dict from something other than a dict")
        budget.charge(len(args[0]) if args else 0)
        return dict(args[0]) if args else {}

    return make


def _members_of(budget: Budget) -> Callable[[tuple], set]:
    def make(args: tuple) -> set:
        items = args[0] if len(args) == 1 and isinstance(args[0], list) else None
        if args and (items is None or not all(isinstance(item, str) for item in items)):
            raise Refused("builds a set from something other than a list of text")
        budget.charge(len(items or ()))
        return set(items or ())

    return make


def _encode(args: tuple) -> bytes:
    match args:
        case (str(text), "latin1" | "latin-1") if all(ord(c) < 256 for c in text):
            return text.encode("latin-1")
    raise Refused("calls _codecs.encode with something other than latin-1 text")


def _whole(values: Any) -> bool:
    return isinstance(values, tuple) and all(type(v) is int and 0 <= v < 1 << 48 for v in values)


def _tensor(args: tuple) -> Tensor:
    match args[:4]:
        case (Storage() as storage, offset, shape, strides) if _whole((offset,)) and _whole(shape) and _whole(strides) \
                and len(shape) == len(strides) <= 8:
            return Tensor(storage, offset, shape, strides)
    raise Refused("rebuilds a tensor from something other than a storage, an offset, a shape and strides")


def _parameter(args: tuple) -> Tensor:
    if not args or not isinstance(args[0], Tensor):
        raise Refused("rebuilds a parameter from something other than a tensor")
    return args[0]


def _scalar(args: tuple) -> float | int | bool:
    match args:
        case (Record(kind="numpy.dtype", args=(str(code), *_), state=state), bytes() | memoryview() as raw) if code in _SCALARS:
            order = ">" if isinstance(state, tuple) and len(state) > 1 and state[1] == ">" else "<"
            dtype = np.dtype(order + code)
            if len(raw) == dtype.itemsize:
                return np.frombuffer(raw, dtype)[0].item()
    raise Refused("holds a numpy scalar that is not a plain number")
