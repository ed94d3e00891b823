"""EDM2's family (NVlabs/edm2 `training/networks_edm2.py`): the magnitude-preserving U-Net under `Precond`.

A description's keys are the keyword arguments of `Precond`, apart from two of ours: `precond` (that class) and `model_type`
("EDM2UNet", which `Precond` always takes). Names are the PyTorch ones from the top, with no prefix:

    unet.emb_fourier.{freqs,phases}  unet.emb_noise.weight  unet.emb_label.weight  unet.out_gain  unet.out_conv.weight
    unet.{enc,dec}.<resolution>_<block>.{emb_gain, conv_res0.weight, emb_linear.weight, conv_res1.weight, conv_skip.weight,
                                         attn_qkv.weight, attn_proj.weight},  unet.enc.<resolution>_conv.weight
    logvar_fourier.{freqs,phases}  logvar_linear.weight

Weights are taken as they are, of any magnitude: the network normalises them itself. `Network.project` is what training does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sim_jax import networks, param_table, tensor_file
from sim_jax.convert import conversion, edm2_pickle, modules, torch_state
from sim_jax.convert.conversion import Converted, Options
from sim_jax.convert.pickle_machine import Record, Refused, show
from sim_jax.types import Array, Cond, Params

PRECOND = "Precond"


def params_from_state(state: Mapping[str, np.ndarray], network: networks.Network, *, source: str = "state") -> Params:
    """A tree for `network` from EDM2's PyTorch names; the Fourier buffers are random numbers, so they must be there.

    Raises: ValueError for a network of another family, or a missing, unused or mis-shaped name.
    """
    if network.spec["precond"] != PRECOND:
        raise ValueError(f"{source}: network.precond: got {network.spec['precond']!r}, allowed for EDM2: {PRECOND}")
    return param_table.from_torch(state, network.shapes(), prefix=network.family.prefix, source=source)


def buffers(network: networks.Network) -> dict[str, np.ndarray]:
    """None: all that EDM2's state dict holds are parameters here."""
    return {}


def load_state(state: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> tuple[Callable[..., Array], Params]:
    """A denoiser from an EDM2 state dict.

    Args:
      state: {PyTorch name: array}, as `net.state_dict()` of EDM2's code; float16 is read as float32.
      config: the keyword arguments of EDM2's `Precond`; "precond" and "model_type" may be left out.
    Returns: (denoise, params); denoise(params, x [B,H,W,C], sigma [B], class_labels=None) -> [B,H,W,C].
    Raises: ValueError for unknown arguments, or names and shapes that do not fit.
    """
    network = networks.build({"precond": PRECOND, **config})

    def denoise(params: Params, x: Array, sigma: Array, class_labels: Array | None = None) -> Array:
        return network.denoise(params, x, sigma, Cond(class_labels))

    return denoise, params_from_state(state, network)


def read(path: str, options: Options = Options()) -> Converted:
    """A teacher from EDM2's pickle (a dict whose "ema" is the network), or from a state dict in any format.

    Raises: ValueError for anything else, or anything that contradicts itself.
    """
    try:
        if tensor_file.is_safetensors(path):
            state, given, info = conversion.read_safetensors(path)
            return from_arrays(state, {**given, **options.network}, info, source=path)
        content = torch_state.read(path)
        root = content["ema"] if isinstance(content, dict) and isinstance(content.get("ema"), Record) else content
        if isinstance(root, Record):
            tree = list(modules.walk(root))
            state, given = conversion.arrays(modules.state(tree)), edm2_pickle.arguments(tree)
        elif isinstance(root, dict):
            state, given = conversion.arrays(root), {}
        else:
            raise Refused(f"holds {show(root)}, expected a dict with 'ema'")
        return from_arrays(state, {**given, **options.network}, {}, source=path)
    except Refused as error:
        raise ValueError(f"{path}: {error}") from None


def is_named_so(state: Mapping[str, np.ndarray]) -> bool:
    """Whether these are EDM2's names."""
    return any(name.startswith("unet.") for name in state)


def from_arrays(state: Mapping[str, np.ndarray], given: Mapping[str, Any], info: Mapping[str, Any], *, source: str) -> Converted:
    """Checks a state against itself and against what is said about it, as `edm.from_arrays`."""
    try:
        found = edm2_pickle.describe(state)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    edm2_pickle.check(given, found, source=source)
    # EDM2 stores scalars without axes; FastGen's copies have one.
    state = {name: array.reshape(()) if array.shape == (1,) and name.endswith("_gain") else array for name, array in state.items()}
    return conversion.fit(state, {**found, "precond": PRECOND, **given}, info, source=source)
