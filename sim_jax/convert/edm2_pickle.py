"""What an EDM2 checkpoint says of its network: counted from its tensors, and read off the objects of a pickle.

As for EDM (`infer`, `edm_pickle`): a state dict shows widths and depths, so a description can be built from it alone and one that
comes with it is checked against it; a pickle's attributes are what its code would compute with, so they must be those that EDM2's
public code sets under the recorded arguments.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from sim_jax.convert import modules
from sim_jax.convert.modules import Module
from sim_jax.convert.pickle_machine import Refused, show

_STAGE = re.compile(r"unet\.enc\.(\d{1,5})x(\d{1,5})_(block|conv|down)(\d{0,4})\.(.+)")
_POSITIONAL = ("img_resolution", "img_channels", "label_dim", "use_fp16", "sigma_data", "logvar_channels")
_LAYERS = ("Block", "MPConv", "MPFourier", "ModuleDict")
_CHECKED = {"Precond": ("img_resolution", "img_channels", "label_dim", "sigma_data"), "UNet": ("label_balance", "concat_balance"),
            "Block": ("res_balance", "attn_balance", "clip_act")}
_LARGEST_RESOLUTION = 4096
_DEFAULTS = {"sigma_data": 0.5, "label_balance": 0.5, "concat_balance": 0.5, "res_balance": 0.3, "attn_balance": 0.3,
             "clip_act": 256}
_RANGES = {"sigma_data": 1e6, "label_balance": 1, "concat_balance": 1, "res_balance": 1, "attn_balance": 1, "clip_act": 1e6,
           "dropout": 1}


def describe(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """A description from names and shapes, with EDM2's defaults for what they do not show.

    Raises: ValueError for names or shapes that are not of EDM2's networks.
    """
    stages = [match.groups() for match in map(_STAGE.fullmatch, state) if match]
    sizes = sorted({int(size) for size, *_ in stages}, reverse=True)
    halving = sizes == [sizes[0] >> level for level in range(len(sizes))] if sizes else False
    if not halving or not 1 <= sizes[-1] <= sizes[0] <= _LARGEST_RESOLUTION:
        raise ValueError("its tensors are not named as in EDM2's networks (unet.enc.64x64_conv.weight and so on)")

    def shape(name: str, ndim: int) -> tuple[int, ...]:
        if name not in state or state[name].ndim != ndim or 0 in state[name].shape:
            raise ValueError(f"{name} is missing or does not have {ndim} axes")
        return state[name].shape

    first, noise = shape(f"unet.enc.{sizes[0]}x{sizes[0]}_conv.weight", 4), shape("unet.emb_noise.weight", 2)
    widths = [shape(f"unet.enc.{s}x{s}_block0.conv_res0.weight", 4)[0] for s in sizes]
    if any(n % widths[0] for n in (*widths, *noise)):
        raise ValueError(f"widths {widths}, {noise} are not multiples of the first")
    attends = tuple(s for s in sizes if f"unet.enc.{s}x{s}_block0.attn_qkv.weight" in state)
    return {
        "img_resolution": sizes[0], "img_channels": first[1] - 1,
        "label_dim": shape("unet.emb_label.weight", 2)[1] if "unet.emb_label.weight" in state else 0,
        "model_channels": widths[0], "channel_mult": tuple(width // widths[0] for width in widths),
        "channel_mult_noise": noise[1] // widths[0], "channel_mult_emb": noise[0] // widths[0],
        "num_blocks": len({number for size, _, kind, number, _ in stages if kind == "block" and int(size) == sizes[0]}),
        "attn_resolutions": attends, "logvar_channels": shape("logvar_fourier.freqs", 1)[0],
    }


def check(given: Mapping[str, Any], found: Mapping[str, Any], *, source: str) -> None:
    """Raises ValueError, naming the keys, where a description is malformed or disagrees with `describe`."""
    wrong = []
    for key, value in given.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if key in _RANGES and not (number and 0 <= value <= _RANGES[key] or key == "clip_act" and value is None):
            wrong.append(f"{key}: {value!r}, allowed: 0 to {_RANGES[key]}")
        if key == "channels_per_head" and type(value) is not int:
            wrong.append(f"{key}: {value!r}, allowed: an integer")
        if key in ("channel_mult", "attn_resolutions", "resample_filter") and not isinstance(value, (tuple, list)):
            wrong.append(f"{key}: {value!r}, allowed: a list of numbers")
    merged = {**found, **{key: value for key, value in given.items() if value is not None}}
    if not wrong:
        for name, one in _widths(merged, found).items():
            if one[0] != one[1]:
                wrong.append(f"{name}: {one[0]}, but its tensors say {one[1]}")
    if wrong:
        raise ValueError(f"{source}: its description has {'; '.join(wrong)}")


def _widths(spec: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Pairs that must agree; widths are compared as products, which is all that tensors show."""
    sizes = [found["img_resolution"] >> level for level in range(len(found["channel_mult"]))]

    def blocks(s: Mapping[str, Any]) -> list[Any]:
        return [s["model_channels"] * mult for mult in s["channel_mult"]]

    plain = ("img_resolution", "img_channels", "label_dim", "num_blocks", "logvar_channels")
    pairs = {key: (spec[key], found[key]) for key in plain}
    pairs["model_channels * channel_mult"] = (blocks(spec), blocks(found))
    pairs["attn_resolutions"] = (tuple(s for s in sizes if s in spec["attn_resolutions"]), found["attn_resolutions"])
    return pairs


def arguments(tree: list[Module]) -> dict[str, Any]:
    """The keyword arguments of EDM2's `Precond` that a pickle records.

    Raises: Refused for classes that are not EDM2's, or attributes that contradict the arguments.
    """
    root = tree[0]
    if root.kind != "Precond":
        raise Refused(f"holds a {show(root.kind)}, allowed: Precond")
    spec = modules.constructor_arguments(root, _POSITIONAL)
    for module in tree:
        if module.name not in ("", "unet") and module.kind not in _LAYERS or module.name == "unet" and module.kind != "UNet":
            raise Refused(f"has a {show(module.kind)} at {module.name}, which is not a layer of EDM2's networks")
        for key in _CHECKED.get(module.kind, ()):
            wanted = spec.get(key, _DEFAULTS.get(key))
            value = module.attributes.get(key, wanted)
            if value != wanted:
                raise Refused(f"has {key}={show(value)} at {show(module.name)}, but was built with {show(wanted)}")
    return spec
