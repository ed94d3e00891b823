"""Stable Diffusion's autoencoder (Rombach et al. 2021, arXiv 2112.10752, appendix G; Esser et al. 2020, arXiv 2012.09841).

    posterior of an image:  mean, logvar = quant_conv(encoder(x)),  logvar clipped to [-30, 20];   image = decoder(post_quant_conv(z))

Diffusion models work on scaling_factor times a sample of the posterior. Names are those of diffusers' `AutoencoderKL`
(`encoder.down_blocks.0.resnets.1.conv1.weight`). Norm statistics and softmax are computed in float32, the rest in `dtype`.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from sim_jax.models import layers, memory
from sim_jax.types import Array

_EPS = 1e-6
_XAVIER = layers.Init("xavier_uniform")


def check(spec: Mapping[str, Any]) -> None:
    """Raises ValueError for a description that no autoencoder can be built from."""

    def refuse(key: str, words: str) -> None:
        raise ValueError(f"autoencoder.{key}: got {spec[key]!r}, allowed: {words}")

    def whole(value: Any) -> bool:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= 1

    for key in ("img_channels", "latent_channels", "layers_per_block", "norm_num_groups"):
        if not whole(spec[key]):
            refuse(key, "a whole number from 1")
    widths = spec["block_out_channels"]
    if not isinstance(widths, tuple) or not widths or not all(whole(n) and n % spec["norm_num_groups"] == 0 for n in widths):
        refuse("block_out_channels", f"multiples of norm_num_groups = {spec['norm_num_groups']}")
    if not (isinstance(spec["scaling_factor"], numbers.Real) and 0 < spec["scaling_factor"] < 1e6):
        refuse("scaling_factor", "a number above 0")


class AutoencoderKL(nn.Module):
    """Encoder and decoder.

    Attributes:
      img_channels, latent_channels: of images and of latents.
      block_out_channels: width per resolution, the image's first; each one after it halves the resolution.
      layers_per_block: residual blocks per resolution of the encoder; the decoder has one more.
      norm_num_groups: of every group normalisation.
      dtype: what convolutions and attention compute in.
      remat: what each residual block keeps for the backward pass, of `memory.POLICIES`.
    """

    img_channels: int = 3
    latent_channels: int = 4
    block_out_channels: Sequence[int] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, images: Array | None = None, latents: Array | None = None) -> tuple[Array | None, Array | None]:
        """(images [B,H,W,C] -> the posterior's mean and logvar [B,h,w,2c], latents [B,h,w,c] -> images); None gives None."""
        moments = None
        if images is not None:
            h = layers.Scope(name="encoder")(_encoder, self, images.astype(self.dtype))
            moments = _conv(self, 2 * self.latent_channels, 1, "quant_conv")(h)
        decoded = None
        if latents is not None:
            h = _conv(self, self.latent_channels, 1, "post_quant_conv")(latents.astype(self.dtype))
            decoded = layers.Scope(name="decoder")(_decoder, self, h)
        return moments, decoded


class Resnet(nn.Module):
    """Residual block [B,H,W,in] -> [B,H,W,features]."""

    features: int
    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = x
        for i in ("1", "2"):
            h = nn.silu(_norm(self.groups, self.dtype, f"norm{i}")(h))
            h = layers.Conv2d(self.features, 3, init=_XAVIER, dtype=self.dtype, name=f"conv{i}")(h)
        if x.shape[-1] != self.features:
            x = layers.Conv2d(self.features, 1, init=_XAVIER, dtype=self.dtype, name="conv_shortcut")(x)
        return x + h


class Attention(nn.Module):
    """Residual self-attention of all pixels with one head, [B,H,W,C] -> [B,H,W,C]."""

    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, height, width, c = x.shape
        h = _norm(self.groups, self.dtype, "group_norm")(x).reshape(b, height * width, c)
        # A bias of the keys is without effect, and its gradient rounding.
        q, k, v = (layers.Linear(c, still_bias=(1, 0) if name == "to_k" else None, init=_XAVIER, dtype=self.dtype, name=name)(h)[:, :, None]
                   for name in ("to_q", "to_k", "to_v"))
        h = layers.attention(q, k, v)[:, :, 0]
        h = layers.Scope(name="to_out")(lambda: layers.Linear(c, init=_XAVIER, dtype=self.dtype, name="0")(h))
        return x + h.reshape(x.shape)


def _norm(groups: int, dtype: Any, name: str) -> layers.GroupNorm:
    return layers.GroupNorm(groups, min_channels_per_group=1, eps=_EPS, dtype=dtype, name=name)


def _conv(net: AutoencoderKL, features: int, kernel: int, name: str, **how: int) -> layers.Conv2d:
    return layers.Conv2d(features, kernel, init=_XAVIER, dtype=net.dtype, name=name, **how)


def _under(path: str, fn: Callable[[], Array]) -> Array:
    """What `fn` makes lies under a dotted path."""
    name, _, rest = path.partition(".")
    return layers.Scope(name=name)(lambda: _under(rest, fn) if rest else fn())


def _resnets(net: AutoencoderKL, x: Array, features: int, count: int) -> Array:
    cls = memory.block(Resnet, net.remat)
    for j in range(count):
        x = cls(features, net.norm_num_groups, net.dtype, name=str(j))(x)
    return x


def _mid(net: AutoencoderKL, x: Array) -> Array:
    cls, attentions = memory.block(Resnet, net.remat), layers.Scope(name="attentions")

    def run() -> Array:
        h = cls(x.shape[-1], net.norm_num_groups, net.dtype, name="0")(x)
        h = attentions(lambda: Attention(net.norm_num_groups, net.dtype, name="0")(h))
        return cls(x.shape[-1], net.norm_num_groups, net.dtype, name="1")(h)

    return _under("resnets", run)


def _last(net: AutoencoderKL, x: Array, features: int) -> Array:
    return _conv(net, features, 3, "conv_out")(nn.silu(_norm(net.norm_num_groups, net.dtype, "conv_norm_out")(x)))


def _encoder(net: AutoencoderKL, x: Array) -> Array:
    """[B,H,W,C] -> [B,h,w,2c]."""
    def levels(x: Array) -> Array:
        for i, features in enumerate(net.block_out_channels):
            x = layers.Scope(name=str(i))(level, x, features, i + 1 < len(net.block_out_channels))
        return x

    def level(x: Array, features: int, down: bool) -> Array:
        x = _under("resnets", lambda: _resnets(net, x, features, net.layers_per_block))
        if not down:
            return x
        padded = jnp.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)])  # below and to the right alone
        return _under("downsamplers.0", lambda: _conv(net, features, 3, "conv", stride=2, padding=0)(padded))

    x = _conv(net, net.block_out_channels[0], 3, "conv_in")(x)
    x = layers.Scope(name="down_blocks")(levels, x)
    x = layers.Scope(name="mid_block")(_mid, net, x)
    return _last(net, x, 2 * net.latent_channels)


def _decoder(net: AutoencoderKL, x: Array) -> Array:
    """[B,h,w,c] -> [B,H,W,C]."""
    def levels(x: Array) -> Array:
        for i, features in enumerate(reversed(net.block_out_channels)):
            x = layers.Scope(name=str(i))(level, x, features, i + 1 < len(net.block_out_channels))
        return x

    def level(x: Array, features: int, up: bool) -> Array:
        x = _under("resnets", lambda: _resnets(net, x, features, net.layers_per_block + 1))
        if not up:
            return x
        return _under("upsamplers.0", lambda: _conv(net, features, 3, "conv")(layers.upsample(x, (1, 1))))

    x = _conv(net, net.block_out_channels[-1], 3, "conv_in")(x)
    x = layers.Scope(name="mid_block")(_mid, net, x)
    x = layers.Scope(name="up_blocks")(levels, x)
    return _last(net, x, net.img_channels)
