"""Weights on disk: safetensors under the PyTorch names, beside the description of the network.

    a teacher directory     network.json (the description, a content hash, whatever else is known) + params.safetensors
    a single file           NAME.safetensors with the same JSON in its metadata, under "sim_jax"

Both hold what EDM's PyTorch code calls `state_dict()`: names with the prefix "model.", convolutions OIHW. float16 files are read
as float32.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import pathlib
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from sim_jax import files, networks, param_table
from sim_jax.checkpoint import read_json
from sim_jax.convert import edm
from sim_jax.types import Params

_WEIGHTS, _NETWORK, _BUILTIN, _KEY = "params.safetensors", "network.json", "builtin:", "sim_jax"


def content_hash(state: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        array = np.ascontiguousarray(state[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _state(params: Params, dtype: str) -> dict[str, np.ndarray]:
    if dtype not in ("float32", "float16"):
        raise ValueError(f"dtype: got {dtype!r}, allowed: float32, float16")
    return {name: array.astype(dtype) for name, array in param_table.to_torch(params).items()}


def _plain_spec(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in spec.items()}


def save_file(path: str | pathlib.Path, params: Params, spec: Mapping[str, Any], info: Mapping[str, Any] | None = None, *,
              dtype: str = "float32") -> None:
    """Writes one .safetensors file, atomically.

    Args:
      params: a network's tree, on the host or one device.
      spec: its description.
      info: what else to record (sigma_init, how it was made, figures): any JSON.
      dtype: "float32", or "float16" for half the size.
    """
    if pathlib.Path(path).suffix != ".safetensors":
        raise ValueError(f"out: got {str(path)!r}, allowed: a name that ends in .safetensors")
    state = _state(params, dtype)
    header = {"network": _plain_spec(spec), "hash": content_hash(state), **(info or {})}
    data = safetensors.numpy.save(state, metadata={_KEY: json.dumps(header, sort_keys=True)})
    files.write_atomically(path, lambda file: file.write(data))


def save_directory(folder: str | pathlib.Path, params: Params, spec: Mapping[str, Any], info: Mapping[str, Any] | None = None,
                   *, dtype: str = "float32") -> None:
    """Writes a teacher directory (module docstring)."""
    folder = files.make_folder(folder, key="out")
    state = _state(params, dtype)
    header = {"network": _plain_spec(spec), "hash": content_hash(state), **(info or {})}
    data = safetensors.numpy.save(state)
    files.write_atomically(folder / _WEIGHTS, lambda file: file.write(data))
    text = json.dumps(header, indent=1, sort_keys=True).encode() + b"\n"
    files.write_atomically(folder / _NETWORK, lambda file: file.write(text))


def resolve(path: str) -> pathlib.Path:
    """"builtin:NAME" names weights that ship inside the package; anything else is a path."""
    if not path.startswith(_BUILTIN):
        return pathlib.Path(path)
    assets = pathlib.Path(str(importlib.resources.files("sim_jax") / "assets"))
    name = path.removeprefix(_BUILTIN)
    shipped = sorted(p.parent.name for p in assets.glob(f"*/{_NETWORK}"))
    if name not in shipped:
        raise ValueError(f"teacher.path: got {path!r}, allowed: {', '.join(_BUILTIN + s for s in shipped) or 'no builtin weights'}, or a path")
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
        header = json.loads(_metadata(where).get(_KEY, "null"))
    else:
        raise ValueError(f"{path}: not found; expected a directory with {_NETWORK} and {_WEIGHTS}, or a .safetensors file of ours")
    if not isinstance(header, dict) or not isinstance(header.get("network"), dict):
        raise ValueError(f"{path}: does not describe its network")
    return header


def _metadata(file: pathlib.Path) -> dict[str, str]:
    try:
        with safetensors.safe_open(file, "numpy") as reader:
            return reader.metadata() or {}
    except (safetensors.SafetensorError, OSError, ValueError, struct.error) as error:
        raise ValueError(f"{file}: not a safetensors file ({error})") from None


def load(path: str, *, dropout: float | None = None) -> tuple[networks.Network, Params, dict[str, Any]]:
    """Weights of ours, onto the host.

    Args:
      path: a directory, a file, or "builtin:NAME".
      dropout: replaces the description's.
    Returns: (network, float32 numpy tree, header).
    Raises: ValueError for anything missing, damaged (the content hash is checked) or not fitting its own description.
    """
    header = read_header(path)
    where = resolve(str(path))
    file = where / _WEIGHTS if where.is_dir() else where
    try:
        state = safetensors.numpy.load_file(file)
    except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{file}: cannot be read ({error})") from None
    if content_hash(state) != header.get("hash"):
        raise ValueError(f"{file}: content does not match the hash in its description; the file is damaged or was exchanged")
    network = networks.build(header["network"], dropout=dropout)
    return network, edm.params_from_state(state, network, source=str(file)), header
