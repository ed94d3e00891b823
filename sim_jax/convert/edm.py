"""EDM's family (NVlabs/edm `training/networks.py`): SongUNet and DhariwalUNet under the VP, VE, iDDPM or EDM preconditioner."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sim_jax import networks, param_table
from sim_jax.types import Array, Cond, Params


def params_from_state(state: Mapping[str, np.ndarray], network: networks.Network, *, source: str = "state") -> Params:
    """A tree for `network` from EDM's PyTorch names.

    Buffers that follow from the description (resampling filters, the iDDPM table `u`) are compared and left out.

    Raises: ValueError for a missing, unused or mis-shaped name, or a buffer that contradicts the description.
    """
    state = dict(state)
    tables = dict(network.precond.tables)
    taps = np.asarray(network.spec.get("resample_filter", (1, 1)), np.float32)
    square = np.outer(taps, taps)[None, None] / taps.sum() ** 2
    for name in [n for n in state if n in tables or n.endswith(".resample_filter")]:
        expected = tables.get(name, square)
        got = np.asarray(state.pop(name), np.float32)
        if got.shape != expected.shape or not np.allclose(got, expected, rtol=1e-3, atol=1e-6):
            raise ValueError(f"{source}: buffer {name} is not the one that the network's description implies")
    return param_table.from_torch(state, network.shapes(), source=source)


def load_state(state: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> tuple[Callable[..., Array], Params]:
    """A denoiser from an EDM state dict.

    Args:
      state: {PyTorch name: array}, as `dict(net.named_parameters())` and buffers of EDM's code.
      config: EDM's constructor arguments, with the preconditioner's class under "precond".
    Returns: (denoise, params); denoise(params, x [B,H,W,C], sigma [B], class_labels=None, augment_labels=None) -> [B,H,W,C].
    Raises: ValueError for unknown arguments, or names and shapes that do not fit.
    """
    network = networks.build(config)

    def denoise(params: Params, x: Array, sigma: Array, class_labels: Array | None = None,
                augment_labels: Array | None = None) -> Array:
        return network.denoise(params, x, sigma, Cond(class_labels, augment_labels))

    return denoise, params_from_state(state, network)
