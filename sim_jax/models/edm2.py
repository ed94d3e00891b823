"""EDM2's magnitude-preserving U-Net (Karras et al. 2024, arXiv 2312.02696, figure 21 and appendix B).

Every operation keeps the expected magnitude of activations, M[x] = sqrt(mean x_i^2), at one:

    normalize(x)     = x / (eps + M[x])                      over all inputs of an output channel, or over a pixel
    MPConv(x)        = conv(x, g normalize(w) / sqrt(fan_in))                   equation 47, g = 1 or a learned gain
    mp_silu(x)       = silu(x) / 0.596                                          equation 81
    mp_sum(a, b, t)  = ((1 - t) a + t b) / sqrt((1 - t)^2 + t^2)                equation 88
    mp_cat(a, b, t)  = sqrt((Na + Nb) / ((1 - t)^2 + t^2)) [(1 - t) a / sqrt(Na), t b / sqrt(Nb)]      equation 103
    MPFourier(c)     = sqrt(2) cos(freqs c + phases)                            equation 75

There are no biases and no group normalisations. In training, `project` puts every weight back to magnitude one after each
update (forced weight normalisation, equation 66): the function does not change, but the effective learning rate no longer
decays as weights grow. Submodule names are those of the public code, from the preconditioner down:
`unet.enc.64x64_block0.conv_res0.weight`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sim_jax.models import layers, memory
from sim_jax.types import Array, Key, Params

_EPS = 1e-4
_SILU_MAGNITUDE = 0.596  # of silu(x), x ~ N(0, 1)


def normalize(x: Array, axes: Sequence[int]) -> Array:
    """x / (1e-4 + root mean square over `axes`), the magnitude in float32; zeros stay zeros, with a finite gradient."""
    square = jnp.mean(jnp.square(x.astype(jnp.float32)), tuple(axes), keepdims=True)
    magnitude = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    return (x / (_EPS + magnitude)).astype(x.dtype)


def _inputs(weight: Array) -> range:
    """The axes of one output channel's inputs: all but the last, in [in, out] and HWIO alike."""
    return range(weight.ndim - 1)


def project(params: Params) -> Params:
    """Forced weight normalisation: every weight to magnitude one (1 - 1e-4, its fixed point); gains and buffers stay."""

    def one(path, leaf):
        return normalize(leaf, _inputs(leaf)) if path[-1].key == "weight" else leaf

    return jax.tree_util.tree_map_with_path(one, params)


def complete(spec: Mapping[str, Any]) -> dict[str, int]:
    """The embedding's widths that `None` stands for: the first, and the largest, of channel_mult."""
    noise, emb = spec["channel_mult_noise"], spec["channel_mult_emb"]
    return {"channel_mult_noise": spec["channel_mult"][0] if noise is None else noise,
            "channel_mult_emb": max(spec["channel_mult"]) if emb is None else emb}


def mp_silu(x: Array) -> Array:
    """Magnitude-preserving SiLU."""
    return nn.silu(x) / _SILU_MAGNITUDE


def mp_sum(a: Array, b: Array, t: float) -> Array:
    """Magnitude-preserving sum: from a (t = 0) to b (t = 1)."""
    return (a + t * (b - a)) / math.hypot(1 - t, t)


def mp_cat(a: Array, b: Array, t: float) -> Array:
    """Magnitude-preserving concatenation of channels, in which b has the share t of the weight."""
    na, nb = a.shape[-1], b.shape[-1]
    scale = math.sqrt(na + nb) / math.hypot(1 - t, t)
    return jnp.concatenate([scale * (1 - t) / math.sqrt(na) * a, scale * t / math.sqrt(nb) * b], axis=-1)


class MPFourier(nn.Module):
    """Random features of the noise level, [B] -> [B, num_channels]; `freqs` and `phases` are buffers and get no gradient."""

    num_channels: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        freqs = memory.parameter(self, "freqs", nn.initializers.normal(2 * math.pi), (self.num_channels,))
        phases = memory.parameter(self, "phases", nn.initializers.uniform(2 * math.pi), (self.num_channels,))
        freqs, phases = jax.lax.stop_gradient((freqs, phases))
        return jnp.cos(x[:, None] * freqs[None] + phases[None]) * math.sqrt(2)


class MPConv(nn.Module):
    """Magnitude-preserving layer without bias: a convolution of [B,H,W,in], or with `kernel=0` a matrix on [B,in]; `parts` as `layers.Conv2d`."""

    features: int
    kernel: int = 0
    parts: int = 1

    @nn.compact
    def __call__(self, x: Array, gain: Array | float = 1.0) -> Array:
        window = (self.kernel, self.kernel) if self.kernel else ()
        shape = (*window, x.shape[-1], self.features)
        w = memory.parameter(self, "weight", nn.initializers.normal(1.0), shape)
        w = (normalize(w, _inputs(w)) * (gain / math.sqrt(math.prod(shape[:-1])))).astype(x.dtype)
        w = layers.by_part(w, self.parts)
        if self.kernel <= 1:
            return layers.product(x, w.reshape(-1, self.features))
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


class Block(nn.Module):
    """Residual block with optional resampling and self-attention; [B,H,W,in] and [B,E] -> [B,H',W',out_channels].

    Encoder blocks resample, project to `out_channels` and normalise each pixel before they branch; decoder blocks project their
    skip connection only.
    """

    out_channels: int
    decoder: bool = False
    up: bool = False
    down: bool = False
    num_heads: int = 0
    resample_filter: tuple[float, ...] = (1, 1)
    dropout: float = 0.0
    res_balance: float = 0.3
    attn_balance: float = 0.3
    clip_act: float | None = 256

    @nn.compact
    def __call__(self, x: Array, emb: Array, dropout_keys: Key | None = None) -> Array:
        cout, project_skip = self.out_channels, x.shape[-1] != self.out_channels
        if self.up:
            x = layers.upsample(x, self.resample_filter)
        if self.down:
            x = layers.downsample(x, self.resample_filter)
        if not self.decoder:
            x = MPConv(cout, 1, name="conv_skip")(x) if project_skip else x
            x = normalize(x, (-1,))

        emb_gain = self.param("emb_gain", nn.initializers.zeros, ())
        scale = MPConv(cout, name="emb_linear")(emb, emb_gain) + 1
        y = MPConv(cout, 3, name="conv_res0")(mp_silu(x))
        y = mp_silu(y * scale[:, None, None, :].astype(y.dtype))
        y = layers.dropout(y, self.dropout, dropout_keys, "/".join(self.path))
        y = MPConv(cout, 3, name="conv_res1")(y)
        if self.decoder and project_skip:
            x = MPConv(cout, 1, name="conv_skip")(x)
        x = mp_sum(x, y, self.res_balance)
        if self.num_heads:
            x = mp_sum(x, self._attend(x), self.attn_balance)
        return x if self.clip_act is None else jnp.clip(x, -self.clip_act, self.clip_act)

    def _attend(self, x: Array) -> Array:
        b, height, width, c = x.shape
        y = MPConv(3 * c, 1, parts=3, name="attn_qkv")(x)  # the checkpoint interleaves: output channel = (head, channel, one of q k v)
        y = normalize(y.reshape(b, height * width, 3, self.num_heads, c // self.num_heads), (-1,))
        q, k, v = jnp.moveaxis(y, 2, 0)
        return MPConv(c, 1, name="attn_proj")(layers.attention(q, k, v).reshape(b, height, width, c))


class EDM2UNet(nn.Module):
    """Noise-conditional U-Net, x [B,H,W,in_channels] -> [B,H,W,out_channels], with EDM2's uncertainty head beside it.

    Attributes:
      img_resolution: H = W, in pixels or latent pixels.
      in_channels, out_channels: channels of input and output.
      label_dim: number of classes; 0 is unconditional.
      model_channels, channel_mult: width and its factor per resolution.
      channel_mult_noise, channel_mult_emb: width of the Fourier features and of the embedding, over model_channels; None is for
        descriptions only (see `complete`).
      num_blocks: residual blocks per resolution.
      attn_resolutions, channels_per_head: resolutions that attend, and how wide a head is.
      label_balance, concat_balance, res_balance, attn_balance: weights t of the class against the noise embedding, the skip
        connections against the main path, and a branch against what it is added to.
      resample_filter: taps, an even number.
      dropout: probability, in effect where `dropout_keys` is given.
      clip_act: activations are clipped to plus and minus this after each block; None does not.
      logvar_channels: Fourier features of the uncertainty head.
      dtype: what convolutions and attention compute in.
      remat: what each block keeps for the backward pass, of `memory.POLICIES`.
    """

    img_resolution: int
    in_channels: int
    out_channels: int
    label_dim: int = 0
    model_channels: int = 192
    channel_mult: Sequence[int] = (1, 2, 3, 4)
    channel_mult_noise: int | None = None
    channel_mult_emb: int | None = None
    num_blocks: int = 3
    attn_resolutions: Sequence[int] = (16, 8)
    label_balance: float = 0.5
    concat_balance: float = 0.5
    resample_filter: Sequence[float] = (1, 1)
    channels_per_head: int = 64
    dropout: float = 0.0
    res_balance: float = 0.3
    attn_balance: float = 0.3
    clip_act: float | None = 256
    logvar_channels: int = 128
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"

    @property
    def feature_channels(self) -> dict[int, int]:
        """Channels of the encoder's map at each resolution, the highest first."""
        return layers.feature_channels(self.img_resolution, self.model_channels, self.channel_mult)

    @nn.compact
    def __call__(self, x: Array, noise_labels: Array, class_labels: Array | None = None, augment_labels: Array | None = None,
                 dropout_keys: Key | None = None, *, return_logvar: bool = False,
                 encode_only: bool = False) -> Array | tuple[Array, Array] | list[Array]:
        """Shapes: x [B,H,W,C]; noise_labels [B]; class_labels [B,label_dim]; keys [B]. `augment_labels` has no effect.

        Returns: [B,H,W,out_channels], and with `return_logvar` also the loss's log variance u(sigma) [B] (equation 21); with
        `encode_only` the output of the encoder's last block at each resolution, the highest first, and nothing else is computed.
        """
        out = _Scope(name="unet")(_unet, self, x, noise_labels, class_labels, dropout_keys, encode_only)
        if encode_only:
            return out
        features = MPFourier(self.logvar_channels, name="logvar_fourier")(noise_labels)
        logvar = MPConv(1, name="logvar_linear")(features)[:, 0]
        return (out, logvar) if return_logvar else out


class _Scope(nn.Module):
    """As `layers.Scope`, but hands itself to `fn`, for parameters that lie directly under its name."""

    @nn.compact
    def __call__(self, fn: Callable, *args):
        return fn(self, *args)


def _unet(scope: nn.Module, net: EDM2UNet, x: Array, noise_labels: Array, class_labels: Array | None, keys: Key | None,
          encode_only: bool) -> Array | list[Array]:
    emb_channels = net.model_channels * net.channel_mult_emb
    emb = MPFourier(net.model_channels * net.channel_mult_noise, name="emb_fourier")(noise_labels)
    emb = MPConv(emb_channels, name="emb_noise")(emb)
    if net.label_dim:
        labels = MPConv(emb_channels, name="emb_label")(class_labels * math.sqrt(net.label_dim))
        emb = mp_sum(emb, labels, net.label_balance)
    emb = mp_silu(emb)

    x = x.astype(net.dtype)
    x = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)  # stands for biases
    x, skips = layers.Scope(name="enc")(_encode, net, x, emb, keys)
    if encode_only:
        return skips[net.num_blocks :: net.num_blocks + 1]
    x = layers.Scope(name="dec")(_decode, net, x, skips, emb, keys)
    return MPConv(net.out_channels, 3, name="out_conv")(x, scope.param("out_gain", nn.initializers.zeros, ()))


def _block(net: EDM2UNet, out_channels: int, name: str, *, attention: bool = False, **where: bool) -> Block:
    cls = memory.block(Block, net.remat)
    return cls(out_channels, num_heads=out_channels // net.channels_per_head if attention else 0,
               resample_filter=tuple(net.resample_filter), dropout=net.dropout, res_balance=net.res_balance,
               attn_balance=net.attn_balance, clip_act=net.clip_act, name=name, **where)


def _encode(net: EDM2UNet, x: Array, emb: Array, keys: Key | None) -> tuple[Array, list[Array]]:
    """[B,H,W,C+1] -> the lowest resolution's activations, and one skip per block, highest resolution first."""
    skips = []
    for level, mult in enumerate(net.channel_mult):
        res = net.img_resolution >> level
        if level == 0:
            x = MPConv(net.model_channels * mult, 3, name=f"{res}x{res}_conv")(x)
        else:
            x = _block(net, x.shape[-1], f"{res}x{res}_down", down=True)(x, emb, keys)
        skips.append(x)
        for idx in range(net.num_blocks):
            attention = res in net.attn_resolutions
            x = _block(net, net.model_channels * mult, f"{res}x{res}_block{idx}", attention=attention)(x, emb, keys)
            skips.append(x)
    return x, skips


def _decode(net: EDM2UNet, x: Array, skips: list[Array], emb: Array, keys: Key | None) -> Array:
    """The lowest resolution's activations and the skips -> [B,H,W,model_channels * channel_mult[0]]."""
    lowest = len(net.channel_mult) - 1
    for level, mult in reversed(list(enumerate(net.channel_mult))):
        res = net.img_resolution >> level
        if level == lowest:
            x = _block(net, x.shape[-1], f"{res}x{res}_in0", decoder=True, attention=True)(x, emb, keys)
            x = _block(net, x.shape[-1], f"{res}x{res}_in1", decoder=True)(x, emb, keys)
        else:
            x = _block(net, x.shape[-1], f"{res}x{res}_up", decoder=True, up=True)(x, emb, keys)
        for idx in range(net.num_blocks + 1):
            x = mp_cat(x, skips.pop(), net.concat_balance)
            attention = res in net.attn_resolutions
            x = _block(net, net.model_channels * mult, f"{res}x{res}_block{idx}", decoder=True, attention=attention)(x, emb, keys)
    return x
