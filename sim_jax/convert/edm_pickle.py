"""What the objects of an EDM pickle say of their network: constructor arguments, checked against every attribute that matters.

The embedded source is not run, so it must not be able to mean anything else: classes are EDM's by name, and each object's numbers
(epsilons, scales, heads, resampling) are those that EDM's public code gives it under the recorded arguments.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sim_jax import networks
from sim_jax.convert import modules
from sim_jax.convert.modules import Module
from sim_jax.convert.pickle_machine import Refused, show
from sim_jax.diffusion import preconditioners

_POSITIONAL = ("img_resolution", "img_channels", "label_dim", "use_fp16")
_LAYERS = ("UNetBlock", "Conv2d", "Linear", "GroupNorm", "PositionalEmbedding", "FourierEmbedding", "ModuleDict")
_LIMITS = ("sigma_min", "sigma_max")


def arguments(tree: list[Module]) -> dict[str, Any]:
    """The description that a pickled preconditioner and its network record: EDM's keyword arguments, `precond`, `model_type`.

    Raises: Refused for classes that are not EDM's, or attributes that contradict the arguments.
    """
    root, family = tree[0], networks.family_of({})
    if root.kind not in family.preconds:
        hint = "; EDM2's networks are kind edm2" if root.kind == "Precond" else ""
        raise Refused(f"holds a {show(root.kind)}, allowed: {', '.join(family.preconds)}{hint}")
    model = next((module.kind for module in tree if module.name == "model"), None)
    if model not in family.models:
        raise Refused(f"has {show(model)} as its network, allowed: {', '.join(family.models)}")
    given = modules.constructor_arguments(root, _POSITIONAL)
    spec = {"precond": root.kind, "model_type": model, "img_channels": 3, **given}
    own = [key for key in (*_POSITIONAL[:3], *preconditioners.arguments(root.kind)) if key in root.attributes]
    for key in own:
        value = root.attributes[key]
        if not isinstance(value, (int, float)):
            raise Refused(f"has {show(value)} as {key}")
        # Limits on sigma do not change the function, and are set on finished networks too.
        if key in _LIMITS:
            spec[key] = value
        elif key in spec and spec[key] != value:
            raise Refused(f"was built with {key}={show(spec[key])}, but has {key}={show(value)} now")
        else:
            spec[key] = value
    if spec["model_type"] != model:
        raise Refused(f"was built with model_type={show(spec['model_type'])}, but holds a {model}")
    _check(tree, spec)
    return spec


def _check(tree: list[Module], spec: Mapping[str, Any]) -> None:
    song = spec["model_type"] == "SongUNet"
    tensors = modules.state(tree)
    for module in tree[1:]:
        if module.name != "model" and module.kind not in _LAYERS:
            raise Refused(f"has a {show(module.kind)} at {module.name}, which is not a layer of EDM's networks")
        for key, wanted in _expected(module, song, tensors).items():
            value = module.attributes.get(key, wanted)
            same = isinstance(value, (int, float)) and math.isclose(value, wanted, rel_tol=1e-6)
            if not same:
                raise Refused(f"has {key}={show(value)} at {module.name}; EDM's {spec['model_type']} has {key}={wanted}, "
                              "so its source was changed")


def _expected(module: Module, song: bool, tensors: Mapping[str, Any]) -> dict[str, float]:
    """What EDM's code gives to a layer beyond what names and shapes of its tensors show."""
    name = module.name
    if module.kind == "GroupNorm":
        channels = tensors[f"{name}.weight"].shape[0] if f"{name}.weight" in tensors else 0
        return {"eps": 1e-6 if song else 1e-5, "num_groups": min(32, channels // 4)}
    if module.kind == "UNetBlock":
        attends = f"{name}.qkv.weight" in tensors
        heads = 1 if song else tensors[f"{name}.proj.weight"].shape[0] // 64 if attends else 0
        return {"num_heads": heads if attends else 0, "skip_scale": math.sqrt(0.5) if song else 1.0,
                "adaptive_scale": 0 if song else 1}
    if module.kind == "Conv2d":
        last = name.removesuffix(".conv0").removesuffix(".skip")
        return {"down": int(last.endswith(("_down", "_aux_residual"))), "up": int(last.endswith("_up")),
                "fused_resample": int(name.endswith("_aux_residual"))}
    if module.kind == "PositionalEmbedding":
        return {"max_positions": 10000, "endpoint": int(song)}
    return {}
