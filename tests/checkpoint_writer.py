"""Writes checkpoints in PyTorch's and EDM's formats byte by byte: the tests' own small stand-ins for real ones, honest or not."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C
_STORAGE = {"float32": "Float", "float16": "Half", "float64": "Double", "bfloat16": "BFloat16", "int64": "Long"}


class Call(NamedTuple):
    """name(*args)"""
    name: str
    args: tuple = ()


class New(NamedTuple):
    """name.__new__(name, *args)"""
    name: str
    args: tuple = ()


class Build(NamedTuple):
    """target, with its state set"""
    target: Any
    state: Any


class Name(NamedTuple):
    name: str


class Pid(NamedTuple):
    """A persistent id."""
    value: Any


class Raw(NamedTuple):
    """Operations as they are."""
    code: bytes


def _name(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return _ops(module) + _ops(attribute) + b"\x93"


def _ops(value: Any) -> bytes:  # noqa: C901, one line per type
    match value:
        case Raw(code):
            return code
        case Call(name, args):
            return _name(name) + _ops(tuple(args)) + b"R"
        case New(name, args):
            return _name(name) + _ops(tuple(args)) + b"\x81"
        case Build(target, state):
            return _ops(target) + _ops(state) + b"b"
        case Name(name):
            return _name(name)
        case Pid(inner):
            return _ops(inner) + b"Q"
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            return b"J" + struct.pack("<i", value) if abs(value) < 1 << 31 else b"\x8a" + bytes([len(raw)]) + raw
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            raw = value.encode()
            return b"X" + struct.pack("<I", len(raw)) + raw
        case bytes():
            return b"B" + struct.pack("<I", len(value)) + value
        case set():
            return b"\x8f(" + b"".join(map(_ops, value)) + b"\x90"
        case tuple():
            return b"(" + b"".join(map(_ops, value)) + b"t"
        case list():
            return b"](" + b"".join(map(_ops, value)) + b"e"
        case dict():
            return b"}(" + b"".join(_ops(key) + _ops(item) for key, item in value.items()) + b"u"
    raise TypeError(type(value))


def dumps(value: Any) -> bytes:
    """A pickle in protocol 4."""
    return b"\x80\x04" + _ops(value) + b"."


def storage_id(array: np.ndarray, key: str = "0", **changes) -> Pid:
    fields = {"tag": "storage", "type": Name(f"torch.{_STORAGE[str(array.dtype)]}Storage"), "key": key, "location": "cpu",
              "count": array.size, "view": None, **changes}
    return Pid(tuple(fields.values()))


def legacy(value: Any, arrays: Mapping[str, np.ndarray], *, counts: Mapping[str, int] | None = None) -> bytes:
    """torch.save's legacy format; `value` refers to `arrays` by `storage_id`."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    out = dumps(MAGIC) + dumps(1001) + dumps(system) + dumps(value) + dumps(list(arrays))
    for key, array in arrays.items():
        out += struct.pack("<q", (counts or {}).get(key, array.size)) + array.tobytes()
    return out


def embedded(array: np.ndarray) -> Call:
    """A storage as pickle.dump writes it."""
    return Call("torch.storage._load_from_bytes", (legacy(storage_id(array), {"0": array}),))


def tensor(storage: Any, shape: tuple[int, ...], *, offset: int = 0, strides: tuple[int, ...] | None = None) -> Call:
    """A parameter over a storage; row-major unless `strides` says otherwise."""
    if strides is None:
        strides = tuple(int(np.prod(shape[i + 1:])) for i in range(len(shape)))
    inner = Call("torch._utils._rebuild_tensor_v2", (storage, offset, tuple(shape), strides, False, Call("collections.OrderedDict")))
    return Call("torch._utils._rebuild_parameter", (inner, False, Call("collections.OrderedDict")))


def zip_file(members: Mapping[str, bytes], *, compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def save_zip(state: Mapping[str, np.ndarray], *, wrap=lambda state: state) -> bytes:
    """torch.save(state) in the zip format."""
    arrays = {str(i): np.ascontiguousarray(array) for i, array in enumerate(state.values())}
    value = wrap({name: tensor(storage_id(arrays[str(i)], str(i)), array.shape) for i, (name, array) in enumerate(state.items())})
    return zip_file({"archive/data.pkl": dumps(value), "archive/byteorder": b"little",
                     **{f"archive/data/{key}": array.tobytes() for key, array in arrays.items()}, "archive/version": b"3\n"})


def save_legacy(state: Mapping[str, np.ndarray]) -> bytes:
    """torch.save(state) in the legacy format."""
    arrays = {str(i): np.ascontiguousarray(array) for i, array in enumerate(state.values())}
    value = {name: tensor(storage_id(arrays[str(i)], str(i)), array.shape) for i, (name, array) in enumerate(state.items())}
    return legacy(value, arrays)


def persistent(class_name: str, state: dict[str, Any], **changes) -> Call:
    """A persistent object of EDM's, with source that would do harm if anybody ran it."""
    meta = {"type": "class", "version": 6, "module_src": "raise SystemExit('executed')", "class_name": class_name, "state": state,
            **changes}
    return Call("torch_utils.persistence._reconstruct_persistent_obj", (meta,))


def edm_module(state: Mapping[str, np.ndarray], spec: Mapping[str, Any], attributes: Mapping[str, dict[str, Any]] | None = None,
               *, name: str = "", tensors: Mapping[str, Any] | None = None) -> Any:
    """An EDM or EDM2 network as nested persistent objects.

    Args:
      state: {PyTorch name: array}, with buffers.
      spec: the description; the root records it as its constructor's arguments.
      attributes: more attributes (of modules by name), over the ones that are written here.
      tensors: replaces tensors by name.
    """
    inside = f"{name}." if name else ""
    children = list(dict.fromkeys(key.removeprefix(inside).split(".")[0] for key in state
                                  if key.startswith(inside) and "." in key.removeprefix(inside)))
    own = {key.removeprefix(inside): (tensors or {}).get(key, tensor(embedded(array), array.shape)) for key, array in state.items()
           if key.startswith(inside) and "." not in key.removeprefix(inside)}
    buffers = {key: value for key, value in own.items() if key in ("resample_filter", "freqs", "phases", "u")}
    fields = {"training": False, "_parameters": {key: value for key, value in own.items() if key not in buffers},
              "_buffers": buffers, "_non_persistent_buffers_set": set(),
              "_modules": {child: edm_module(state, spec, attributes, name=inside + child, tensors=tensors) for child in children}}
    said_by_class = ("precond", "model_type") if spec["precond"] == "Precond" else ("precond",)
    kind = (_class_of_edm2 if spec["precond"] == "Precond" else _class_of)(name, spec, set(children))
    if not name:
        fields |= {"img_resolution": spec["img_resolution"], "_init_args": (),
                   "_init_kwargs": {k: list(v) if isinstance(v, tuple) else v for k, v in spec.items() if k not in said_by_class}}
    fields |= (attributes or {}).get(name, {})
    if kind == "ModuleDict":
        return Build(New("torch.nn.modules.container.ModuleDict"), fields)
    return persistent((attributes or {}).get(name, {}).get("class_name", kind), fields)


def _class_of(name: str, spec: Mapping[str, Any], children: set[str]) -> str:
    last = name.rpartition(".")[2]
    if name in ("", "model"):
        return spec["model_type"] if name else spec["precond"]
    if name in ("model.enc", "model.dec"):
        return "ModuleDict"
    if "conv0" in children:
        return "UNetBlock"
    if last.startswith("map_") or last == "affine":
        return "FourierEmbedding" if last == "map_noise" else "Linear"
    return "GroupNorm" if "norm" in last else "Conv2d"


def _class_of_edm2(name: str, spec: Mapping[str, Any], children: set[str]) -> str:
    if name in ("unet.enc", "unet.dec"):
        return "ModuleDict"
    if name in ("", "unet"):
        return "UNet" if name else "Precond"
    return "Block" if "conv_res0" in children else "MPFourier" if name.endswith("fourier") else "MPConv"


def edm_pickle(state: Mapping[str, np.ndarray], spec: Mapping[str, Any], attributes: Mapping[str, dict[str, Any]] | None = None,
               tensors: Mapping[str, Any] | None = None, key: str = "ema") -> bytes:
    """network-snapshot.pkl of EDM's training loop."""
    return dumps({key: edm_module(state, spec, attributes, tensors=tensors)})


def safetensors(state: Mapping[str, np.ndarray], **changes: Any) -> bytes:
    """A safetensors file; `changes` replace entries of the header."""
    header, body = {}, b""
    for name, array in state.items():
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [len(body), len(body) + array.nbytes]}
        body += array.tobytes()
    return safetensors_raw({**header, **changes}, body)


def safetensors_raw(header: Any, body: bytes) -> bytes:
    import json

    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + body
