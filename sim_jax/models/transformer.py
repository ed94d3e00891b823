"""Parts of the diffusion transformers, on tokens [B,N,D] (Peebles and Xie 2022, arXiv 2212.09748, figure 3).

    modulate(x; shift, scale) = (1 + scale) (x - mean) / sqrt(var + 1e-6) + shift,    mean and variance over a token's channels
    positions: sines and cosines of the column, then of the row, at wavelengths 2 pi 10000^(4i / D)

Submodule names are those of the public PyTorch code of DiT and of PixArt-alpha, which share them. Whatever has two axes there lies
transposed here, tables too: `scale_shift_table` [6, D] is [D, 6] (`sim_jax.param_table`). The embedding of the noise level, norms,
modulations and softmax are computed in float32, the rest in `dtype`.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from sim_jax.models import layers
from sim_jax.types import Array

_EPS = 1e-6
_FREQUENCIES = 256  # width of the sinusoidal features of a scalar
XAVIER = layers.Init("xavier_uniform")
SMALL = layers.Init("normal", weight=0.02)
ZERO = layers.Init(weight=0.0)
_BOOLEANS = ("micro_conditions", "endpoint", "learn_sigma")
_SMALLEST = {"M": 2, "patch_size": 1, "hidden_size": 4, "depth": 1, "num_heads": 1, "label_dim": 0, "caption_channels": 1,
             "caption_tokens": 0, "pixels_per_latent": 1}


def complete(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Checks a description; nothing follows from it. Raises: ValueError for what no transformer can be built from."""

    def refuse(key: str, words: str) -> None:
        raise ValueError(f"network.{key}: got {spec[key]!r}, allowed: {words}")

    for key, low in _SMALLEST.items():
        if key in spec and not (isinstance(spec[key], numbers.Integral) and not isinstance(spec[key], bool) and spec[key] >= low):
            refuse(key, f"a whole number from {low}")
    for key in ("mlp_ratio", "interpolation_scale"):
        if key in spec and not (isinstance(spec[key], numbers.Real) and 0 < spec[key] < math.inf):
            refuse(key, "a number above 0")
    for key in _BOOLEANS:
        if key in spec and not isinstance(spec[key], bool):
            refuse(key, "true or false")
    for key in ("beta_start", "beta_end"):
        if key in spec and not (isinstance(spec[key], numbers.Real) and 0 < spec[key] < 1):
            refuse(key, "from 0 to 1 (exclusive)")
    unit = 12 if spec.get("micro_conditions") else 4
    if spec["hidden_size"] % unit or spec["hidden_size"] % spec["num_heads"]:
        refuse("hidden_size", f"a multiple of {unit} and of num_heads = {spec['num_heads']}")
    if spec["img_resolution"] % spec["patch_size"]:
        refuse("img_resolution", f"a multiple of patch_size = {spec['patch_size']}")
    if "caption_channels" in spec and spec["label_dim"]:
        refuse("label_dim", f"0 with {spec['model_type']}, whose conditions are texts")
    return {}


def modulate(x: Array, shift: Array, scale: Array) -> Array:
    """Adaptive layer norm of x [B,N,D] by shift and scale [B,1,D]; computed in float32, in x's type."""
    h = x.astype(jnp.float32)
    h = h - jnp.mean(h, -1, keepdims=True)
    h = h * layers.inverse_sqrt(jnp.mean(jnp.square(h), -1, keepdims=True) + _EPS)
    return (h * (1 + scale) + shift).astype(x.dtype)


def positions(height: int, width: int, channels: int, *, base: int, scale: float = 1.0) -> Array:
    """Fixed position features [height * width, channels] float32, the column's first.

    Args:
      base: side of the grid that the network was made for, in tokens; other grids are stretched or squeezed to it.
      scale: by which that grid is squeezed itself, for a network that was trained on smaller images before.
    """
    def waves(size: int) -> np.ndarray:
        at = np.arange(size) / (size / base) / scale
        angle = at[:, None] * 10000.0 ** -(np.arange(channels // 4) / (channels / 4))[None]
        return np.concatenate([np.sin(angle), np.cos(angle)], 1).astype(np.float32)

    # Put together on the device: as one constant, a large image's table would lie in the program.
    shape = (height, width, channels // 2)
    columns, rows = (jnp.asarray(waves(size)) for size in (width, height))
    grid = jnp.concatenate([jnp.broadcast_to(columns[None], shape), jnp.broadcast_to(rows[:, None], shape)], -1)
    return grid.reshape(height * width, channels)


def patchify(x: Array, features: int, patch: int, *, dtype: Any, base: int, scale: float = 1.0) -> Array:
    """Images [B,H,W,C] -> tokens [B, H/patch * W/patch, features] with positions; makes the submodule `proj`.

    Raises: ValueError for images that patches do not tile.
    """
    _, height, width, channels = x.shape
    if height % patch or width % patch:
        raise ValueError(f"x: got {height}x{width}, allowed: multiples of patch_size = {patch}")
    inputs = channels * patch * patch
    # Xavier's bound for the matrix that the convolution is, not for its window.
    init = layers.Init("xavier_uniform", weight=math.sqrt((inputs + features * patch * patch) / (inputs + features)))
    x = layers.Conv2d(features, patch, stride=patch, padding=0, init=init, dtype=dtype, name="proj")(x)
    place = positions(*x.shape[1:3], features, base=base, scale=scale)
    return x.reshape(x.shape[0], -1, features) + place[None].astype(dtype)


def unpatchify(x: Array, height: int, width: int, patch: int) -> Array:
    """Tokens [B, height/patch * width/patch, patch * patch * C] -> images [B,height,width,C]."""
    x = x.reshape(x.shape[0], height // patch, width // patch, patch, patch, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(x.shape[0], height, width, -1)


class ScalarEmbedder(nn.Module):
    """Scalars [B] -> [B, features], in float32: the noise level's `t_embedder`, and those of an image's size."""

    features: int

    @nn.compact
    def __call__(self, t: Array) -> Array:
        def mlp(h: Array) -> Array:
            h = layers.Linear(self.features, init=SMALL, name="0")(h)
            return layers.Linear(self.features, init=SMALL, name="2")(nn.silu(h))

        return layers.Scope(name="mlp")(mlp, layers.positional_embedding(t.astype(jnp.float32), _FREQUENCIES))


class Mlp(nn.Module):
    """Two layers with GELU's tanh approximation, [..., D] -> [..., features]."""

    hidden: int
    features: int
    init: layers.Init = XAVIER
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = layers.Linear(self.hidden, init=self.init, dtype=self.dtype, name="fc1")(x)
        return layers.Linear(self.features, init=self.init, dtype=self.dtype, name="fc2")(nn.gelu(h, approximate=True))


class SelfAttention(nn.Module):
    """Attention among tokens, [B,N,D] -> [B,N,D]."""

    num_heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, n, d = x.shape
        # Softmax ignores a bias of the keys: its gradient is rounding, of which Adam would make full steps.
        qkv = layers.Linear(3 * d, still_bias=(3, 1), init=XAVIER, dtype=self.dtype, name="qkv")(x)
        q, k, v = jnp.moveaxis(qkv.reshape(b, n, 3, self.num_heads, d // self.num_heads), 2, 0)
        return layers.Linear(d, init=XAVIER, dtype=self.dtype, name="proj")(layers.attention(q, k, v).reshape(b, n, d))
