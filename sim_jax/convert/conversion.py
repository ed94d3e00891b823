"""What every kind of checkpoint becomes: PyTorch names with arrays, the network's description, and what else is known."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from sim_jax import networks, param_table, tensor_file
from sim_jax.convert.pickle_machine import Record, Refused, show
from sim_jax.convert.torch_names import Tensor

_FLOATS = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)
_KEY = "sim_jax"
_KEPT = ("sigma_init", "sigmas", "sigma_cond", "labels", "ema", "step", "made_by", "figures")
_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,200}")


class Converted(NamedTuple):
    """A checkpoint, read and checked.

    Attributes:
      state: {PyTorch name: array}, exactly the network's parameters; views of the file.
      network: that the state fits.
      info: what goes into network.json beside the description: sigma_init of one-step generators, where it came from.
    """

    state: Mapping[str, np.ndarray]
    network: networks.Network
    info: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What a user can say about a file.

    Attributes:
      network: description keys that the file does not hold, or does not need to.
      ema: which of several averages.
    """

    network: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ema: str | None = None


def arrays(tensors: Mapping[Any, Any]) -> dict[str, np.ndarray]:
    """{name: view of the file} of a flat state dict.

    Raises: Refused for anything but tensors under plain names, tensors that lead out of their storages, or many tensors over the
        same storage.
    """
    out, used, storages = {}, 0, {}
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise Refused(f"has a tensor under the name {show(name)}")
        if isinstance(tensor, np.ndarray):  # of a safetensors file, checked when it was read
            out[name] = tensor
            continue
        if not isinstance(tensor, Tensor):
            what = show(tensor.kind) if isinstance(tensor, Record) else f"a {type(tensor).__name__}"
            raise Refused(f"is no state dict: {name} is {what}, not a tensor")
        out[name] = tensor.array()
        used += tensor.nbytes
        storages[id(tensor.storage)] = len(tensor.storage.data)
    if used > 2 * sum(storages.values()):
        raise Refused(f"describes {used} bytes of tensors in {sum(storages.values())} bytes of storages")
    return out


def read_safetensors(path: str) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, Any]]:
    """(state, description, what else is recorded) of a safetensors file; the last two are empty where it is not one of ours.

    Raises: ValueError for what is no safetensors file, or a description that is none.
    """
    state, metadata = tensor_file.read(path)
    if _KEY not in metadata:
        return state, {}, {}
    try:
        header = json.loads(metadata[_KEY])
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict) or not isinstance(header.get("network"), dict):
        raise ValueError(f"{path}: its metadata {_KEY!r} does not describe a network")
    levels = header.get("sigmas", [])
    sigmas = [header.get("sigma_init", 1.0), header.get("sigma_cond", 1.0), *(levels if isinstance(levels, list) else [None])]
    labels = header.get("labels", {})
    if not all(type(sigma) in (int, float) and 0 < sigma < 1e6 for sigma in sigmas) or not isinstance(labels, dict):
        raise ValueError(f"{path}: its metadata {_KEY!r} has no possible sigma_init or labels")
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in header["network"].items()}
    return state, given, {key: header[key] for key in _KEPT if key in header}


def finite(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A description without infinite limits, which are the defaults and cannot be written as JSON."""
    return {key: value for key, value in spec.items() if value != float("inf")}


def fit(state: Mapping[str, np.ndarray], spec: Mapping[str, Any], info: Mapping[str, Any], *, source: str) -> Converted:
    """Checks that a state without buffers is exactly the network's that `spec` describes.

    Raises: ValueError listing names that are missing, unused, mis-shaped, of a type that is no float, or not finite.
    """
    network = networks.build(finite(spec))
    param_table.check(state, network.shapes(), prefix=network.family.prefix, source=source)
    check_numbers(state, source=source)
    return Converted(dict(state), network, info)


def check_numbers(state: Mapping[str, np.ndarray], *, source: str) -> None:
    """Raises ValueError listing tensors of a type that is no float, or with numbers that are not finite."""
    wrong = [name for name, array in state.items() if array.dtype not in _FLOATS]
    if wrong:
        raise ValueError(f"{source}: {wrong[0]} holds {state[wrong[0]].dtype}, allowed: floating point")
    bad = [name for name, array in state.items() if not np.isfinite(array).all()]
    if bad:
        raise ValueError(f"{source}: {len(bad)} tensors hold numbers that are not finite: {', '.join(bad[:8])}")
