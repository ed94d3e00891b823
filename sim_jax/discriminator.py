"""Discriminators: a denoiser's encoder and heads on its features, as functions of two parameter trees.

In DMD2 the encoder is the fake score's and learns with the heads; in FastGen and f-distill it is the teacher's and stays as it is.
Which of the two it is, and who gets gradients, is up to the caller: it says which parameters of the backbone to bind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sim_jax import param_table
from sim_jax.models import discriminator as models
from sim_jax.models import memory
from sim_jax.networks import Network
from sim_jax.types import Array, Cond, Key, Params

HEADS = models.KINDS


@dataclasses.dataclass(frozen=True, eq=False)
class Discriminator:
    """Logits of whether x_t = x_0 + sigma n comes from a real x_0; parameters are the heads' alone.

    Attributes:
      backbone: whose features it reads; the heads compute in its dtype.
      resolutions: of the features; () is the lowest alone.
      head: "conv" or "mean" (`sim_jax.models.discriminator`).
      gather: of the heads' parameters, as a network's.

    Raises: ValueError, on construction, for resolutions that the backbone does not have, or an unknown head.
    """

    backbone: Network
    resolutions: tuple[int, ...] = ()
    head: str = "conv"
    gather: memory.Gather | None = None

    def __post_init__(self) -> None:
        if self.head not in HEADS:
            raise ValueError(f"gan.head: got {self.head!r}, allowed: {', '.join(HEADS)}")
        self.backbone.feature_shapes(self.resolutions)

    @property
    def module(self) -> Any:
        """The flax module of the heads."""
        return models.Heads(kind=self.head, dtype=self.backbone.dtype)

    def init(self, key: Key) -> Params:
        """Random parameters of the heads, float32; an empty tree for heads without any."""
        maps = [jnp.zeros((1, *shape)) for shape in self.backbone.feature_shapes(self.resolutions)]
        return self.module.init(key, maps).get("params", {})

    def shapes(self) -> Params:
        """The tree of `init`, as ShapeDtypeStructs; computes nothing."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def project(self, params: Params) -> Params:
        """What training does to the heads after every update: nothing."""
        return params

    def num_params(self) -> int:
        """Numbers in the heads."""
        return param_table.count(self.shapes())

    def bind(self, backbone_params: Params, head_params: Params, *,
             dropout_keys: Key | None = None) -> Callable[[Array, Array, Cond], Array]:
        """The discriminator of these parameters: (x_t [B,H,W,C], sigma [B], cond) -> logits [B,L] float32, above 0 for "real".

        Args:
          backbone_params: of `backbone`; constants where only x_t and the heads should get gradients.
          head_params: as from `init`.
          dropout_keys: [B] keys to run the backbone with dropout; None evaluates.
        """
        def discriminate(x: Array, sigma: Array, cond: Cond) -> Array:
            maps = self.backbone.features(
                backbone_params, x, sigma, cond, resolutions=self.resolutions, dropout_keys=dropout_keys)
            with memory.gathering(self.gather):
                return self.module.apply({"params": head_params}, maps)

        return discriminate
