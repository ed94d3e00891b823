"""Layers shared by the U-Nets of EDM's public code (Karras et al. 2022, arXiv 2206.00364, appendix F).

Every parameter carries its PyTorch name (`weight`, `bias`, `freqs`) in JAX's layout: convolutions HWIO instead of OIHW, linear
layers [in, out] instead of [out, in] (`sim_jax.param_table` converts). Parameters are float32; `dtype` is the type that the
convolutions and attention compute in, while normalisation statistics, softmax and the noise embedding stay in float32.

Randomness: dropout takes one key per sample, so that a sample's mask does not depend on the batch it sits in.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sim_jax.models import memory
from sim_jax.types import Array, Key


class Init(NamedTuple):
    """How a layer starts: `mode` of the distribution, then a factor for the weight and one for the bias."""

    mode: str = "kaiming_normal"
    weight: float = 1.0
    bias: float = 0.0


def _initializer(mode: str, fan_in: int, fan_out: int, scale: float) -> Callable[..., Array]:
    """The four initialisations of EDM's code, and "normal" of variance 1, as `(key, shape) -> float32 array`, multiplied by `scale`."""
    uniform = {"xavier_uniform": 6 / (fan_in + fan_out), "kaiming_uniform": 3 / fan_in}
    normal = {"xavier_normal": 2 / (fan_in + fan_out), "kaiming_normal": 1 / fan_in, "normal": 1.0}

    def init(key: Key, shape: Sequence[int], dtype=jnp.float32) -> Array:
        if scale == 0.0:
            return jnp.zeros(shape, dtype)
        if mode in uniform:
            bound = float(np.sqrt(uniform[mode])) * scale
            return jax.random.uniform(key, shape, dtype, -abs(bound), abs(bound))
        return jax.random.normal(key, shape, dtype) * (float(np.sqrt(normal[mode])) * scale)

    return init


def product(x: Array, w: Array) -> Array:
    """[..., in] @ [in, out] -> [..., out], as a product of two matrices: only so do CPUs compute the gradient in `w` without first turning
    around what it is a product of."""
    return (x.reshape(-1, x.shape[-1]) @ w).reshape(*x.shape[:-1], w.shape[-1])


def by_part(values: Array, parts: int) -> Array:
    """[..., n parts], where entry i * parts + j is number i of part j -> the same, one part after the other."""
    if parts == 1:
        return values
    return jnp.swapaxes(values.reshape(*values.shape[:-1], -1, parts), -1, -2).reshape(values.shape)


class Linear(nn.Module):
    """Fully connected layer, [..., in] -> [..., out], in `dtype`.

    `still_bias` = (n, i): of n equal parts of the features, the biases of part i get no gradient.
    """

    features: int
    bias: bool = True
    still_bias: tuple[int, int] | None = None
    init: Init = Init()
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        fans = (x.shape[-1], self.features)
        w = memory.parameter(self, "weight", _initializer(self.init.mode, *fans, self.init.weight), (x.shape[-1], self.features), self.dtype)
        x = product(x.astype(self.dtype), w)
        if self.bias:
            b = memory.parameter(self, "bias", _initializer(self.init.mode, *fans, self.init.bias), (self.features,), self.dtype)
            if self.still_bias is not None:
                parts, which = self.still_bias
                b = jnp.where(np.arange(self.features) * parts // self.features == which, jax.lax.stop_gradient(b), b)
            x = x + b.reshape((1,) * (x.ndim - 1) + (-1,))
        return x


def _shift(x: Array, axis: int, start: int, size: int, stride: int = 1) -> Array:
    return jax.lax.slice_in_dim(x, start, start + (size - 1) * stride + 1, stride, axis)


def _pad(x: Array, axis: int, low: int, high: int) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (low, high)
    return jnp.pad(x, widths)


def downsample(x: Array, resample_filter: Sequence[float], *, pad: int | None = None) -> Array:
    """Filters and halves both image axes of [B,H,W,C]: the stride-2 depthwise convolution of EDM's `Conv2d(down=True)`.

    The filter is an outer product, so each axis is a short sum of strided slices, which XLA fuses; a depthwise convolution of
    the same filter is slower on every backend. `pad` defaults to the centred padding (taps - 1) // 2.
    """
    taps = np.asarray(resample_filter, np.float64) / np.sum(resample_filter)
    pad = (len(taps) - 1) // 2 if pad is None else pad
    for axis in (1, 2):
        padded = _pad(x, axis, pad, pad)
        size = (padded.shape[axis] - len(taps)) // 2 + 1
        x = sum(float(f) * _shift(padded, axis, j, size, 2) for j, f in enumerate(taps))
    return x


def upsample(x: Array, resample_filter: Sequence[float]) -> Array:
    """Doubles both image axes of [B,H,W,C] and filters: the transposed depthwise convolution of `Conv2d(up=True)`.

    Output pixel n gathers the taps j with n + pad - j even, from input pixel (n + pad - j) / 2: two phases per axis.
    """
    taps = 2.0 * np.asarray(resample_filter, np.float64) / np.sum(resample_filter)
    pad = (len(taps) - 1) // 2
    for axis in (1, 2):
        size, reach = x.shape[axis], len(taps)
        padded = _pad(x, axis, reach, reach)
        phases = []
        for phase in (0, 1):
            used = [j for j in range(len(taps)) if (phase + pad - j) % 2 == 0]
            phases.append(sum(float(taps[j]) * _shift(padded, axis, reach + (phase + pad - j) // 2, size) for j in used))
        shape = list(x.shape)
        shape[axis] *= 2
        x = jnp.stack(phases, axis + 1).reshape(shape)
    return x


class Conv2d(nn.Module):
    """2-D convolution with optional resampling, [B,H,W,in] -> [B,H',W',features]; `kernel=0` only resamples.

    `fused_down`: the padding of filter and kernel is applied once, before the kernel (NCSN++'s residual branch), which differs
    from filtering first at the image's border.
    `stride` and `padding` (default kernel // 2) are the kernel's own, without a filter. `parts` = n > 1: the weight's output channel
    i * n + j is channel i of part j, and the parts come out one after the other (turning the weight around costs less than turning the
    image); the biases of part `still_part` get no gradient.
    """

    features: int
    kernel: int
    bias: bool = True
    stride: int = 1
    padding: int | None = None
    up: bool = False
    down: bool = False
    fused_down: bool = False
    parts: int = 1
    still_part: int | None = None
    resample_filter: tuple[float, ...] = (1, 1)
    init: Init = Init()
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x.astype(self.dtype)
        fused = self.down and self.fused_down and self.kernel
        if self.up:
            x = upsample(x, self.resample_filter)
        if self.down and not fused:
            x = downsample(x, self.resample_filter)
        if not self.kernel:
            return x
        k, cin = self.kernel, x.shape[-1]
        fans = (cin * k * k, self.features * k * k)
        w = memory.parameter(self, "weight", _initializer(self.init.mode, *fans, self.init.weight), (k, k, cin, self.features), self.dtype)
        w = by_part(w, self.parts)
        pad = (k // 2 if self.padding is None else self.padding) + ((len(self.resample_filter) - 1) // 2 if fused else 0)
        # Where it is a matrix product it is written as one: a CPU computes a convolution's gradient in the weights with the whole batch
        # turned around, images last.
        if k == 1 and pad == 0 and self.stride == 1:
            x = product(x, w[0, 0])
        elif pad == 0 and x.shape[1:3] == (k, k):
            x = (x.reshape(-1, k * k * cin) @ w.reshape(-1, self.features))[:, None, None]
        else:
            x = jax.lax.conv_general_dilated(
                x, w, (self.stride, self.stride), [(pad, pad), (pad, pad)], dimension_numbers=("NHWC", "HWIO", "NHWC"))
        if fused:
            x = downsample(x, self.resample_filter, pad=0)
        if self.bias:
            b = memory.parameter(self, "bias", _initializer(self.init.mode, *fans, self.init.bias), (self.features,), self.dtype)
            if self.still_part is not None:
                b = jnp.where(np.arange(self.features) % self.parts == self.still_part, jax.lax.stop_gradient(b), b)
            x = x + by_part(b, self.parts)[None, None, None]
        return x


def inverse_sqrt(x: Array) -> Array:
    """1 / sqrt(x). XLA makes an rsqrt of this, but written as `lax.rsqrt`, whose derivative divides by x, a network that one loss
    differentiates and another one does not is no longer one program to it, and all behind the first norm is computed twice."""
    return jnp.power(x, -0.5)


class GroupNorm(nn.Module):
    """Group normalisation of [B,H,W,C] with at least four channels a group; statistics in float32, output in `dtype`."""

    num_groups: int = 32
    min_channels_per_group: int = 4
    eps: float = 1e-5
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = x.shape[-1]
        groups = min(self.num_groups, c // self.min_channels_per_group)
        if not groups or c % groups:
            raise ValueError(f"network.model_channels: gives a layer of {c} channels, allowed: multiples of {self.num_groups}, or of "
                             f"{self.min_channels_per_group} below {self.num_groups * self.min_channels_per_group}")
        weight = memory.parameter(self, "weight", nn.initializers.ones, (c,))
        bias = memory.parameter(self, "bias", nn.initializers.zeros, (c,))
        x = x.astype(jnp.float32)

        # Pixels first, then channels of a group: every reduction runs along memory, which XLA vectorises.
        def group_mean(values: Array) -> Array:
            per_group = jnp.mean(jnp.mean(values, (1, 2)).reshape(-1, groups, c // groups), -1)
            return jnp.repeat(per_group, c // groups, axis=1)[:, None, None]

        centred = x - group_mean(x)
        scale = inverse_sqrt(group_mean(jnp.square(centred)) + self.eps) * weight[None, None, None]
        return (centred * scale + bias[None, None, None]).astype(self.dtype)


def positional_embedding(x: Array, num_channels: int, *, max_positions: float = 10000, endpoint: bool = False) -> Array:
    """Timestep embedding of DDPM++ and ADM: [B] -> [B, num_channels], cosines first."""
    half = num_channels // 2
    freqs = np.power(1 / max_positions, np.arange(half, dtype=np.float32) / (half - (1 if endpoint else 0)))
    angle = x[:, None] * jnp.asarray(freqs, jnp.float32)[None]
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=1)


class FourierEmbedding(nn.Module):
    """Timestep embedding of NCSN++: [B] -> [B, num_channels], cosines first; `freqs` is a buffer and gets no gradient."""

    num_channels: int
    scale: float = 16.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        freqs = memory.parameter(self, "freqs", nn.initializers.normal(self.scale), (self.num_channels // 2,))
        angle = x[:, None] * (2 * np.pi * jax.lax.stop_gradient(freqs))[None]
        return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=1)


def feature_channels(img_resolution: int, model_channels: int, channel_mult: Sequence[int]) -> dict[int, int]:
    """{resolution: channels} of what a U-Net's encoder hands on at each level, the highest first."""
    return {img_resolution >> level: model_channels * mult for level, mult in enumerate(channel_mult)}


class Scope(nn.Module):
    """Gives the modules that `fn(*args)` makes the prefix `name`, as a PyTorch `ModuleDict` does; holds nothing itself."""

    @nn.compact
    def __call__(self, fn: Callable, *args):
        return fn(*args)


def attention(q: Array, k: Array, v: Array) -> Array:
    """Softmax attention over [B, T, heads, channels], scaled by 1/sqrt(channels), softmax in float32."""
    return jax.nn.dot_product_attention(q, k, v)


def dropout(x: Array, rate: float, keys: Key | None, name: str) -> Array:
    """Inverted dropout of [B, ...] with one key per sample; `keys=None` is evaluation mode and returns `x`."""
    if keys is None or rate == 0.0:
        return x
    salt = zlib.crc32(name.encode())
    keep = jax.vmap(lambda key: _kept(jax.random.fold_in(key, salt), rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))


def _kept(key: Key, rate: float, shape: Sequence[int]) -> Array:
    """Which elements of `shape` stay, each with probability 1 - rate, which is met to 2^-17: 16 bits decide, as hashing is what costs."""
    bits = jax.random.bits(key, ((shape[0] + 1) // 2, *shape[1:]), jnp.uint32)
    halves = jnp.concatenate([bits & 0xFFFF, bits >> 16])[:shape[0]]
    return halves >= round(rate * 2**16)


class UNetBlock(nn.Module):
    """Residual block with optional resampling and self-attention: the union of what DDPM++, NCSN++ and ADM use.

    [B,H,W,in] and the embedding [B,E] -> [B,H',W',out_channels]. `num_heads=0` leaves the attention out.
    """

    out_channels: int
    up: bool = False
    down: bool = False
    num_heads: int = 0
    dropout: float = 0.0
    skip_scale: float = 1.0
    eps: float = 1e-5
    resample_filter: tuple[float, ...] = (1, 1)
    resample_proj: bool = False
    adaptive_scale: bool = True
    init: Init = Init()
    init_zero: Init = Init(weight=0.0)
    init_attn: Init | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, emb: Array, dropout_keys: Key | None = None) -> Array:
        cout, dtype = self.out_channels, self.dtype
        resample = dict(up=self.up, down=self.down, resample_filter=self.resample_filter, dtype=dtype)
        skip = x.astype(dtype)

        h = nn.silu(GroupNorm(eps=self.eps, dtype=dtype, name="norm0")(x))
        h = Conv2d(cout, 3, init=self.init, name="conv0", **resample)(h)
        affine = Linear(cout * (2 if self.adaptive_scale else 1), init=self.init, name="affine")(emb)[:, None, None, :]
        norm1 = GroupNorm(eps=self.eps, dtype=dtype, name="norm1")
        if self.adaptive_scale:
            scale, shift = jnp.split(affine.astype(dtype), 2, axis=-1)
            h = nn.silu(shift + norm1(h) * (scale + 1))
        else:
            h = nn.silu(norm1(h + affine.astype(dtype)))
        h = dropout(h, self.dropout, dropout_keys, "/".join(self.path))
        h = Conv2d(cout, 3, init=self.init_zero, dtype=dtype, name="conv1")(h)

        if x.shape[-1] != cout or self.up or self.down:
            kernel = 1 if self.resample_proj or x.shape[-1] != cout else 0
            skip = Conv2d(cout, kernel, init=self.init, name="skip", **resample)(skip)
        x = (h + skip) * self.skip_scale
        if self.num_heads:
            x = (self._attend(x) + x) * self.skip_scale
        return x

    def _attend(self, x: Array) -> Array:
        b, height, width, c = x.shape
        h = GroupNorm(eps=self.eps, dtype=self.dtype, name="norm2")(x)
        # The checkpoint interleaves: output channel = (head, channel, one of q k v). A bias of the keys adds the same to all logits of
        # a query, which softmax ignores: its gradient, held still, is rounding, and Adam would make full steps of that.
        h = Conv2d(3 * c, 1, init=self.init_attn or self.init, parts=3, still_part=1, dtype=self.dtype, name="qkv")(h)
        q, k, v = (part.reshape(b, height * width, self.num_heads, c // self.num_heads) for part in jnp.split(h, 3, axis=-1))
        h = attention(q, k, v).reshape(b, height, width, c)
        return Conv2d(c, 1, init=self.init_zero, dtype=self.dtype, name="proj")(h)


def drop_labels(class_labels: Array, rate: float, keys: Key | None) -> Array:
    """Zeroes whole rows of [B, label_dim] with probability `rate` (classifier-free guidance), by per-sample keys."""
    keep = kept_conditions(rate, keys)
    return class_labels if keep is None else jnp.where(keep[:, None], class_labels, jnp.zeros_like(class_labels))


def kept_conditions(rate: float, keys: Key | None) -> Array | None:
    """Which samples keep their label or caption, [B] of bool, by per-sample keys; None: all of them."""
    if keys is None or rate == 0.0:
        return None
    salt = zlib.crc32(b"label_dropout")
    return jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, salt), 1 - rate))(keys)
