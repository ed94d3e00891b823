"""An EDM network's description from its state dict alone: which layers there are, and how wide they are.

Everything that determines the raw network's function can be read off names and shapes, apart from the preconditioner (VP, VE and
EDM hold the same tensors) and dropout. Since the description is counted, not believed, building it cannot take more than the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

_STAGE = re.compile(r"model\.(enc|dec)\.(\d{1,5})x(\d{1,5})_([a-z_]+?)(\d{0,4})\.(.+)")
_LARGEST_RESOLUTION = 4096
_NUMBERS = ("sigma_min", "sigma_max", "sigma_data", "beta_d", "beta_min", "epsilon_t", "C_1", "C_2")


def describe(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The description, as `sim_jax.networks` takes it, without dropout.

    Args:
      state: {PyTorch name: array}, names as in EDM's `EDMPrecond`, with its buffers if there are any.
    Raises: ValueError for names or shapes that are not of EDM's networks.
    """
    stages = [match.groups() for match in map(_STAGE.fullmatch, state) if match]
    sizes = sorted({int(size) for part, size, *_ in stages if part == "enc"}, reverse=True)
    if not sizes or sizes != [sizes[0] >> level for level in range(len(sizes))] or sizes[-1] < 1:
        raise ValueError("its tensors are not named as in EDM's networks (model.enc.32x32_conv.weight and so on)")
    top = f"{sizes[0]}x{sizes[0]}"
    adm = "model.out_conv.weight" in state
    first, mapping = _shape(state, f"model.enc.{top}_conv.weight", 4), _shape(state, "model.map_layer0.weight", 2)
    width = mapping[1] if adm else first[0]
    output = _shape(state, "model.out_conv.weight" if adm else f"model.dec.{top}_aux_conv.weight", 4)[0]
    spec = {
        "precond": "iDDPMPrecond" if output == 2 * first[1] else "EDMPrecond",
        "model_type": "DhariwalUNet" if adm else "SongUNet",
        "img_resolution": sizes[0], "img_channels": first[1],
        "label_dim": _columns(state, "model.map_label.weight"), "augment_dim": _columns(state, "model.map_augment.weight"),
        "model_channels": width, "channel_mult_emb": _times(mapping[0], width, "map_layer0"),
        "channel_mult": tuple(_times(_shape(state, f"model.enc.{s}x{s}_block0.conv0.weight", 4)[0], width, f"enc.{s}x{s}_block0")
                              for s in sizes),
        "num_blocks": len({number for part, size, _, kind, number, _ in stages
                           if part == "enc" and kind == "block" and int(size) == sizes[0]}),
        "attn_resolutions": tuple(s for s in sizes if f"model.enc.{s}x{s}_block0.qkv.weight" in state),
    }
    if "u" in state:
        spec["M"] = len(state["u"]) - 1
    if not adm:
        spec["embedding_type"] = "fourier" if "model.map_noise.freqs" in state else "positional"
        spec["channel_mult_noise"] = _times(mapping[1], width, "map_layer0")
    if not adm and len(sizes) > 1:
        kinds = {kind for part, _, _, kind, _, _ in stages if part == "enc"}
        levels = {size for part, size, _, kind, _, _ in stages if part == "dec" and kind == "aux_norm"}
        spec["encoder_type"] = "residual" if "aux_residual" in kinds else "skip" if "aux_skip" in kinds else "standard"
        spec["decoder_type"] = "skip" if len(levels) > 1 else "standard"
        spec["resample_filter"] = _taps(state, spec["embedding_type"])
    return spec


def check_values(given: Mapping[str, Any], found: Mapping[str, Any], *, source: str) -> None:
    """Types and ranges of description keys that somebody else wrote, before anything is built from them.

    Raises: ValueError naming the key.
    """
    if found["img_resolution"] > _LARGEST_RESOLUTION:
        raise ValueError(f"{source}: network.img_resolution: got {found['img_resolution']}, allowed: up to {_LARGEST_RESOLUTION}")
    for key, value in given.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if key in found:
            fine = isinstance(value, list | tuple) if isinstance(found[key], tuple) else type(value) is type(found[key])
        elif key == "M":
            fine = type(value) is int and 2 <= value <= 100_000
        elif key in ("dropout", "label_dropout"):
            fine = number and 0 <= value <= 1
        elif key == "use_fp16":
            fine = isinstance(value, bool)
        elif key in _NUMBERS:
            fine = number and (key == "sigma_max" and value == float("inf") or 0 <= value <= 1e6)
        else:
            fine = isinstance(value, (str, int, float, list, tuple))  # what the network does not know is refused by name later
        if not fine:
            raise ValueError(f"{source}: network.{key}: got {value!r}, which is not a possible value")


def contradictions(given: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Where a full description disagrees with `describe`, as "key: a, but its tensors say b"."""
    out = []
    for key in sorted(found.keys() - {"precond"}):
        said, seen = given[key], found[key]
        if key == "attn_resolutions":
            sizes = [found["img_resolution"] >> level for level in range(len(found["channel_mult"]))]
            said = tuple(size for size in sizes if size in said)
        if said != seen:
            out.append(f"{key}: {said!r}, but its tensors say {seen!r}")
    doubled = given.get("precond") == "iDDPMPrecond"
    if doubled != (found["precond"] == "iDDPMPrecond"):
        out.append(f"precond: {given.get('precond')!r}, but it has {'twice ' if not doubled else ''}the image's channels as output")
    return out


def _shape(state: Mapping[str, np.ndarray], name: str, ndim: int) -> tuple[int, ...]:
    if name not in state:
        raise ValueError(f"it has no {name}, which EDM's networks have")
    if state[name].ndim != ndim or 0 in state[name].shape:
        raise ValueError(f"{name} has shape {state[name].shape}, it should have {ndim} axes")
    return state[name].shape


def _columns(state: Mapping[str, np.ndarray], name: str) -> int:
    return _shape(state, name, 2)[1] if name in state else 0


def _times(a: int, width: int, where: str) -> int:
    if a % width:
        raise ValueError(f"{where} has {a} channels, which is no multiple of model_channels = {width}")
    return a // width


def _taps(state: Mapping[str, np.ndarray], embedding: str) -> tuple[int, ...]:
    """From the outer product of the taps with themselves, normalised, that resampling layers keep; else what goes with DDPM++ or
    NCSN++."""
    squares = [array for name, array in state.items() if name.endswith(".resample_filter")]
    if not squares:
        return (1, 3, 3, 1) if embedding == "fourier" else (1, 1)
    square = squares[0].astype(np.float64)
    if square.ndim != 4 or not 1 <= square.shape[-1] <= 16 or not (square > 0).all():
        raise ValueError(f"a resample_filter has shape {square.shape} or entries that are not positive")
    row = square.reshape(-1, square.shape[-1]).sum(0)
    return tuple(int(round(min(r, 1e6))) for r in row / row.min())
