"""What the converters of diffusion transformers share: DiT's and PixArt's PyTorch names, which are ours, and diffusers'.

Files hold tensors alone, so heads and, under diffusers' names, the image's size are not in them: they are known for the published widths,
or stand in the config.json that diffusers keeps beside, or the user says them (--network).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sim_jax import networks, param_table, tensor_file
from sim_jax.convert import conversion, renaming, torch_state
from sim_jax.convert.conversion import Converted, Options
from sim_jax.convert.pickle_machine import Refused, show
from sim_jax.types import Params

PRECOND = "DDPMPrecond"
_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # of DiT-S, B, L, XL; PixArt-XL is as wide as DiT-XL
_WRAPPERS = ("ema", "state_dict_ema", "state_dict")  # training checkpoints; the average before what it is of
_LARGEST_RESOLUTION = 4096
_POSITIONS, _TOLERANCE = "pos_embed", 5e-3  # of bfloat16, at 1


def open_state(path: str, options: Options) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, Any]]:
    """(state, description, what else is recorded) of a file in any format, out of a training checkpoint's wrapper and without "module."."""
    if tensor_file.is_safetensors(path):
        state, given, info = conversion.read_safetensors(path)
        return state, {**given, **options.network}, info
    content = torch_state.read(path)
    if isinstance(content, dict):
        content = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), dict)), content)
    if not isinstance(content, dict):
        raise Refused(f"holds {show(content)}, expected a state dict")
    state = conversion.arrays(content)
    if state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): array for name, array in state.items()}
    return state, dict(options.network), {}


def is_diffusers(state: Mapping[str, np.ndarray]) -> bool:
    return any(name.startswith("transformer_blocks.") for name in state)


def depth(state: Mapping[str, np.ndarray], prefix: str) -> int:
    """How many blocks there are names of. Raises: ValueError for none, or numbers that leave gaps."""
    found = {int(match[1]) for name in state if (match := re.match(re.escape(prefix) + r"\.(\d{1,4})\.", name))}
    if not found or found != set(range(len(found))):
        raise ValueError(f"its tensors are not named as this kind's are ({prefix}.0 and so on)")
    return len(found)


def from_diffusers(state: Mapping[str, np.ndarray], rows: list[renaming.Row], given: Mapping[str, Any], path: str, classes: tuple[str, ...]
                   ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(the state under our names, the description with what stands beside the file)."""
    config = renaming.config_beside(path, classes)
    names = {"sample_size": "img_resolution", "num_attention_heads": "num_heads", "interpolation_scale": "interpolation_scale"}
    beside = {ours: config[theirs] for theirs, ours in names.items() if config.get(theirs) is not None}
    return renaming.to_ours({name: array for name, array in state.items() if name != "pos_embed.pos_embed"}, rows), {**beside, **given}


def read(path: str, options: Options, *, rows: Callable[[Mapping[str, np.ndarray]], list[renaming.Row]], classes: tuple[str, ...],
         from_arrays: Callable[..., Converted]) -> Converted:
    """A teacher of either family, under the original names or diffusers'.

    Args:
      rows: a state under diffusers' names -> the table of both.
      classes: diffusers' for it.
      from_arrays: the family's own checks.
    Raises: ValueError for anything that is not the family's, or contradicts itself.
    """
    try:
        state, given, info = open_state(path, options)
        if is_diffusers(state):
            state, given = from_diffusers(state, rows(state), given, path, classes)
        return from_arrays(state, given, info, source=path)
    except Refused as error:
        raise ValueError(f"{path}: {error}") from None


def size(state: Mapping[str, np.ndarray], name: str, ndim: int) -> tuple[int, ...]:
    """A tensor's shape. Raises: ValueError where it is missing or has another number of axes."""
    if name not in state or state[name].ndim != ndim or 0 in state[name].shape:
        raise ValueError(f"its {name} {'is missing' if name not in state else f'has shape {state[name].shape}'}")
    return state[name].shape


def describe(state: Mapping[str, np.ndarray], model_type: str) -> dict[str, Any]:
    """What both families' tensors say about themselves."""
    width, channels, patch, _ = size(state, "x_embedder.proj.weight", 4)
    outputs = size(state, "final_layer.linear.weight", 2)[0]
    if outputs not in (patch**2 * channels, 2 * patch**2 * channels):
        raise ValueError(f"its final_layer.linear has {outputs} outputs, expected {patch**2 * channels} or twice that")
    return {"precond": PRECOND, "model_type": model_type, "img_channels": channels, "patch_size": patch, "hidden_size": width,
            "depth": depth(state, "blocks"), "mlp_ratio": size(state, "blocks.0.mlp.fc1.weight", 2)[0] / width,
            "learn_sigma": outputs != patch**2 * channels}


def finish(state: dict[str, np.ndarray], found: Mapping[str, Any], given: Mapping[str, Any], info: Mapping[str, Any], *, source: str,
           scale: Callable[[int], float], check_positions: bool = True) -> Converted:
    """Puts what the tensors say and what is said about them together, and checks one against the other.

    Args:
      state: under our names, with or without pos_embed.
      found, given: description keys.
      scale: img_resolution -> interpolation_scale where nobody says it.
      check_positions: whether pos_embed has to be what the description implies; without, it is left out unseen.
    Raises: ValueError for contradictions, or names and shapes that do not fit.
    """
    wrong = [f"{key}: {given[key]!r}, but its tensors say {found[key]!r}" for key in sorted(found.keys() & given.keys())
             if given[key] != found[key]]
    if wrong:
        raise ValueError(f"its description says {'; '.join(wrong)}")
    spec = {**found, **given}
    spec.setdefault("num_heads", _HEADS.get(spec["hidden_size"]))
    if spec["num_heads"] is None:
        raise ValueError(f"network.num_heads: cannot be told for width {spec['hidden_size']}, say it: --network='{{\"num_heads\": ...}}'")
    stored = state.get(_POSITIONS)
    if "img_resolution" not in spec and stored is not None and stored.ndim == 3:
        spec["img_resolution"] = math.isqrt(stored.shape[1]) * spec["patch_size"]
    side = spec.get("img_resolution")
    if type(side) is not int or not 0 < side <= _LARGEST_RESOLUTION:
        raise ValueError(f"network.img_resolution: got {side!r}, the latent image's side, up to {_LARGEST_RESOLUTION}; where the file does "
                         "not have it, say it: --network='{\"img_resolution\": 64}' for 512 pixels")
    if found["model_type"] == "PixArt":
        spec.setdefault("interpolation_scale", scale(side))
    network = networks.build(conversion.finite(spec))
    if not check_positions:
        state.pop(_POSITIONS, None)
    return conversion.fit(without_buffers(state, network, source=source), spec, info, source=source)


def buffers(network: networks.Network) -> dict[str, np.ndarray]:
    """The fixed positions, so that the original code's strict `load_state_dict` finds all that it expects."""
    return {_POSITIONS: np.asarray(network.module.positions())}


def without_buffers(state: Mapping[str, np.ndarray], network: networks.Network, *, source: str) -> dict[str, np.ndarray]:
    """`state` without pos_embed. Raises: ValueError where it is not what the description implies."""
    state = dict(state)
    if _POSITIONS in state:
        got, wanted = np.asarray(state.pop(_POSITIONS), np.float32), buffers(network)[_POSITIONS]
        if got.shape != wanted.shape or not np.abs(got - wanted).max() < _TOLERANCE:
            raise ValueError(f"{source}: buffer {_POSITIONS} {got.shape} is not the one that the network's description implies "
                             f"(img_resolution, interpolation_scale)")
    return state


def params_from_state(state: Mapping[str, np.ndarray], network: networks.Network, *, source: str = "state") -> Params:
    """A tree for `network` from the original names. Raises: ValueError for a missing, unused or mis-shaped name, or other positions."""
    state = without_buffers(state, network, source=source)
    return param_table.from_torch(state, network.shapes(), prefix=network.family.prefix, source=source)
