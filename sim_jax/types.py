"""The types every room of the house shares. Imports nothing from the project."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

Array = jax.Array
Key = jax.Array      # a typed PRNG key, scalar or [B]
Params = Any         # a pytree of arrays, named as in the PyTorch checkpoint


class Cond(NamedTuple):
    """What a network is conditioned on besides the noise level; `None` where it takes nothing.

    Attributes:
      class_labels: [B, label_dim] float32, one-hot (all zeros: no label).
      augment_labels: [B, augment_dim] float32, EDM's augmentation labels (zeros: not augmented).
      text: [B, L, D] any float, captions as a text encoder's last states.
      text_mask: [B, L], nonzero where a caption has a token; None: everywhere.
    """

    class_labels: Array | None = None
    augment_labels: Array | None = None
    text: Array | None = None
    text_mask: Array | None = None


class NoiseLevel(NamedTuple):
    """A point of the forward process, x_t = alpha * x_0 + sigma * noise; each entry is [B] float32."""

    t: Array
    alpha: Array
    sigma: Array


# x_t [B,H,W,C], sigma [B], cond -> prediction of x_0 [B,H,W,C], float32. The input is in variance-exploding form
# (alpha = 1); another process is rescaled to it by the caller: D(x_t / alpha; sigma / alpha).
DenoiseFn = Callable[[Array, Array, Cond], Array]
