"""Weights on disk: safetensors under the PyTorch names, beside the description of the network.

    a teacher directory     network.json (the description, a content hash, whatever else is known) + params.safetensors
    a single file           NAME.safetensors with the same JSON in its metadata, under "sim_jax"

Both hold what the PyTorch code calls `state_dict()`: in EDM's case names with the prefix "model."; convolutions OIHW. float16
files are read as float32.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sim_jax import convert, files, networks, param_table, tensor_file
from sim_jax.checkpoint import read_json
from sim_jax.types import Params

_WEIGHTS, _NETWORK, _BUILTIN, _KEY = "params.safetensors", "network.json", "builtin:", "sim_jax"


def content_hash(state: Mapping[str, np.ndarray], dtype: str | None = None) -> str:
    """SHA-256 over names, types, shapes and bytes, in the order of the names; `dtype` hashes them as if they were of that type."""
    digest = hashlib.sha256()
    for name in sorted(state):
        kind = np.dtype(dtype or state[name].dtype)
        digest.update(f"{name} {kind.str} {state[name].shape}\n".encode())
        digest.update(tensor_file.as_bytes(state[name], kind))
    return digest.hexdigest()


def _check_dtype(dtype: str) -> None:
    if dtype not in ("float32", "float16"):
        raise ValueError(f"dtype: got {dtype!r}, allowed: float32, float16")


def _header(state: Mapping[str, np.ndarray], spec: Mapping[str, Any], info: Mapping[str, Any] | None, dtype: str) -> dict[str, Any]:
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in spec.items()}
    return {"network": plain, "hash": content_hash(state, dtype), **(info or {})}


def save_file(path: str | pathlib.Path, params: Params, spec: Mapping[str, Any], info: Mapping[str, Any] | None = None, *,
              dtype: str = "float32") -> None:
    """Writes one .safetensors file, atomically. It has EDM's buffers too, so that EDM's `load_state_dict` takes it as it is.

    Args:
      params: a network's tree, on the host or one device.
      spec: its description.
      info: what else to record (sigma_init, how it was made, figures): any JSON.
      dtype: "float32", or "float16" for half the size.
    """
    if pathlib.Path(path).suffix != ".safetensors":
        raise ValueError(f"out: got {str(path)!r}, allowed: a name that ends in .safetensors")
    _check_dtype(dtype)
    network = networks.build(spec)
    state = {**param_table.to_torch(params, prefix=network.family.prefix), **convert.buffers(network)}
    metadata = {_KEY: json.dumps(_header(state, spec, info, dtype), sort_keys=True)}
    files.write_atomically(path, lambda file: tensor_file.write(file, state, dtype=dtype, metadata=metadata))


def save_directory(folder: str | pathlib.Path, params: Params, spec: Mapping[str, Any], info: Mapping[str, Any] | None = None,
                   *, dtype: str = "float32") -> None:
    """Writes a teacher directory (module docstring); arguments as in `save_file`."""
    state = param_table.to_torch(params, prefix=networks.family_of(spec).prefix)
    save_state_directory(folder, state, spec, info, dtype=dtype)


def save_state_directory(folder: str | pathlib.Path, state: Mapping[str, np.ndarray], spec: Mapping[str, Any],
                         info: Mapping[str, Any] | None = None, *, dtype: str = "float32",
                         progress: Callable[[int], None] | None = None) -> None:
    """As `save_directory`, from PyTorch's names and layouts; takes the memory of one tensor.

    Args:
      state: {PyTorch name: array}, such as views of another file.
      progress: called with how many numbers are written.
    """
    _check_dtype(dtype)
    folder = files.make_folder(folder, key="out")
    size = np.dtype(dtype).itemsize
    tick = None if progress is None else lambda written: progress(written // size)
    text = json.dumps(_header(state, spec, info, dtype), indent=1, sort_keys=True).encode() + b"\n"
    files.write_atomically(folder / _WEIGHTS, lambda file: tensor_file.write(file, state, dtype=dtype, progress=tick))
    files.write_atomically(folder / _NETWORK, lambda file: file.write(text))


def resolve(path: str) -> pathlib.Path:
    """"builtin:NAME" names weights that ship inside the package; anything else is a path."""
    if not path.startswith(_BUILTIN):
        return pathlib.Path(path)
    assets = pathlib.Path(str(importlib.resources.files("sim_jax") / "assets"))
    name = path.removeprefix(_BUILTIN)
    shipped = sorted(p.parent.name for p in assets.glob(f"*/{_NETWORK}"))
    if name not in shipped:
        allowed = ", ".join(_BUILTIN + s for s in shipped) or "no builtin weights"
        raise ValueError(f"teacher.path: got {path!r}, allowed: {allowed}, or a path")
    return assets / name


def read_header(path: str) -> dict[str, Any]:
    """The JSON beside the weights: "network", "hash" and what was recorded. Reads no weights.

    Raises: ValueError if there is nothing, or nothing of ours.
    """
    where = resolve(str(path))
    if where.is_dir():
        if not (where / _NETWORK).is_file():
            raise ValueError(f"{path}: no {_NETWORK} there; a directory of weights holds {_NETWORK} and {_WEIGHTS}")
        header = read_json(where / _NETWORK)
    elif where.is_file():
        try:
            header = json.loads(tensor_file.read(where)[1].get(_KEY, "null"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: its description is not JSON ({error})") from None
    else:
        raise ValueError(f"{path}: not found; expected a directory with {_NETWORK} and {_WEIGHTS}, or a .safetensors file of ours")
    if not isinstance(header, dict) or not isinstance(header.get("network"), dict):
        raise ValueError(f"{path}: does not describe its network")
    return header


def load(path: str, *, dropout: float | None = None) -> tuple[networks.Network, Params, dict[str, Any]]:
    """Weights of ours, as views of the memory-mapped file.

    Checking the content hash streams through the file; after that, only what is used is in memory: `sharding.place` then reads from
    the file what its own devices hold, and no process has a whole copy.

    Args:
      path: a directory, a file, or "builtin:NAME".
      dropout: replaces the description's.
    Returns: (network, float32 numpy tree, header); read-only, and on the host where the file holds float16.
    Raises: ValueError for anything missing, damaged (the content hash is checked) or not fitting its own description.
    """
    state, header, source = read(path)
    network = networks.build(header["network"], dropout=dropout)
    return network, convert.params_from_state(state, network, source=source), header


def read(path: str) -> tuple[dict[str, np.ndarray], dict[str, Any], str]:
    """(state of views of the file, header, the file's name), the content hash checked; whatever the network is. Raises: ValueError."""
    header = read_header(path)
    where = resolve(str(path))
    file = where / _WEIGHTS if where.is_dir() else where
    state, _ = tensor_file.read(file)
    if content_hash(state) != header.get("hash"):
        raise ValueError(f"{file}: content does not match the hash in its description; the file is damaged or was exchanged")
    return state, header, str(file)
