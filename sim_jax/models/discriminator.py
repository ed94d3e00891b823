"""Heads that read a denoiser's features and say "real" or "generated" (DMD2, Yin et al. 2024, arXiv 2405.14867, section 4.3).

"conv" is DMD2's head for EDM's networks, one per feature map, and FastGen's for several maps:

    [convolution 4x4 of stride 2, padding 1; GroupNorm; SiLU]  until the map is at most 4x4
    convolution of the map's size, without padding; GroupNorm; SiLU;  convolution 1x1 to one logit

with as many channels as the map has, and PyTorch's default initialisation. "mean" is SiDA's (Zhou et al. 2024, arXiv 2410.14919):
every pixel's mean over the channels is a logit, so the encoder itself learns to tell and there are no parameters.

Names are FastGen's: `discriminator_heads.<index of the map>.<place in the sequence, where SiLU counts>`; DMD2's only head has the
same places under `cls_pred_branch`.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from sim_jax.models import layers
from sim_jax.types import Array

KINDS = ("conv", "mean")
_INIT = layers.Init("kaiming_uniform", weight=float(np.sqrt(1 / 3)), bias=float(np.sqrt(1 / 3)))


class Heads(nn.Module):
    """One head per feature map, maps [B,r,r,C] -> logits [B,L] float32; L is the number of maps, or with "mean" of their pixels.

    Attributes:
      kind: "conv" or "mean".
      dtype: what convolutions compute in.
    """

    kind: str = "conv"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, maps: Sequence[Array]) -> Array:
        if self.kind == "mean":
            logits = [jnp.mean(x.astype(jnp.float32), axis=-1).reshape(x.shape[0], -1) for x in maps]
        else:
            logits = layers.Scope(name="discriminator_heads")(_convs, maps, self.dtype)
        return jnp.concatenate(logits, axis=1)


def _convs(maps: Sequence[Array], dtype: jnp.dtype) -> list[Array]:
    return [layers.Scope(name=str(index))(_conv_head, x, dtype) for index, x in enumerate(maps)]


def _conv_head(x: Array, dtype: jnp.dtype) -> Array:
    """[B,r,r,C] -> [B,1]."""
    channels, place = x.shape[-1], 0
    while x.shape[1] > 1 or not place:
        stride, padding, kernel = (2, 1, 4) if x.shape[1] > 4 else (1, 0, x.shape[1])
        x = layers.Conv2d(channels, kernel, stride=stride, padding=padding, init=_INIT, dtype=dtype, name=str(place))(x)
        x = nn.silu(layers.GroupNorm(dtype=dtype, name=str(place + 1))(x))
        place += 3
    return layers.Conv2d(1, 1, init=_INIT, dtype=dtype, name=str(place))(x).reshape(-1, 1).astype(jnp.float32)
