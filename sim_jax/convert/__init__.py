"""Foreign checkpoints in, ours out: strict tables of names, one module per model family (`kinds.TABLE`)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sim_jax import networks
from sim_jax.convert import edm, edm2, transformer
from sim_jax.types import Params

__all__ = ["buffers", "edm", "edm2", "params_from_state", "transformer"]
_FAMILIES = {edm2.PRECOND: edm2, transformer.PRECOND: transformer}


def params_from_state(state: Mapping[str, np.ndarray], network: networks.Network, *, source: str = "state") -> Params:
    """A tree for `network` from its family's PyTorch names. Raises: ValueError for names, shapes or buffers that do not fit."""
    return _FAMILIES.get(network.spec["precond"], edm).params_from_state(state, network, source=source)


def buffers(network: networks.Network) -> dict[str, np.ndarray]:
    """What the family's PyTorch code keeps beside the parameters, and can be computed from the description."""
    return _FAMILIES.get(network.spec["precond"], edm).buffers(network)
