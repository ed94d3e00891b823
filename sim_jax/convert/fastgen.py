"""FastGen's checkpoints (NVlabs/FastGen) of its EDM networks.

    a converted teacher, edm-*.pth     a flat state dict under EDM's names
    a training checkpoint, N.pth       {"model": {"net": ..., "ema": ..., ...}, "optimizer": ..., "iteration": ...}

FastGen's networks have one more layer than EDM's, `model.logvar_linear`, an uncertainty head that does not act on the image: it is
left out. Two-time networks (MeanFlow's `r_timestep`) compute something else and are refused. A student starts at its schedule's
largest noise, x = 80 z, in one call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sim_jax.convert import edm, torch_state
from sim_jax.convert.conversion import Converted, Options
from sim_jax.convert.pickle_machine import Refused, show

_SIGMA_INIT = 80.0
_HEAD = ("model.logvar_linear.weight", "model.logvar_linear.bias")


def read(path: str, options: Options = Options()) -> Converted:
    """A teacher from a converted file; a one-step generator from a training checkpoint, `options.ema` or its first average.

    Raises: ValueError as `edm.read` does, and for networks that are not EDM's.
    """
    content = torch_state.read(path)
    try:
        info: dict[str, Any] = {}
        if isinstance(content, dict) and isinstance(content.get("model"), dict):
            content, ema = _choose(content["model"], options.ema)
            info = {"sigma_init": _SIGMA_INIT, "ema": ema}
        elif options.ema is not None:
            raise Refused("holds one network, so there is no average to choose (ema)")
        if not isinstance(content, dict):
            raise Refused("holds no state dict")
        state = {name: tensor for name, tensor in content.items() if name not in _HEAD}
        _check(state)
        return edm.read_content(state, options, info=info, source=path)
    except Refused as error:
        raise ValueError(f"{path}: {error}") from None


def _choose(models: Mapping[Any, Any], wanted: str | None) -> tuple[Any, str]:
    names = [name for name in models if isinstance(name, str)]
    name = wanted or next((name for name in names if name.startswith("ema")), "net")
    if name not in names:
        raise Refused(f"has no {show(name)}, allowed: {', '.join(show(n) for n in names[:20]) or 'nothing'}")
    return models[name], name


def _check(state: Mapping[Any, Any]) -> None:
    names = [name for name in state if isinstance(name, str)]
    if any(name.startswith("model.r_timestep") for name in names):
        raise Refused("is a network of two times (r_timestep), which is none of EDM's")
    first = next((state[name] for name in names if name.startswith("model.enc.") and name.endswith("_conv.weight")), None)
    mapping = state.get("model.map_layer0.weight")
    fourier = "model.map_noise.freqs" in state
    shapes = [tuple(getattr(tensor, "shape", ())) for tensor in (first, mapping)]
    if not fourier and all(shapes) and shapes[1][1:] == (2 * shapes[0][0],):
        raise Refused("takes twice as wide a time embedding as EDM's networks, as for two times (r_timestep)")
