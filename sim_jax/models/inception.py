"""Inception-v3 (Szegedy et al. 2015, https://arxiv.org/abs/1512.00567) as FID uses it: the network of 2015-12-05, for inference.

It differs from the paper's, and from torchvision's, in what the graph `classify_image_graph_def.pb` happens to do:

    batch normalisation  y = (x - running_mean) weight / sqrt(running_var + 0.001) + bias
    average pooling      3x3 in Mixed_5b ... 6e and 7b, dividing by the number of pixels inside of the image
    Mixed_7c             pools by the maximum instead
    classes              1008, of which ImageNet has 1000

Names are those of PyTorch ports (mseitzer/pytorch-fid, toshas/torch-fidelity); the graph calls Mixed_5b ... 7c mixed, mixed_1 ... 10.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sim_jax.types import Array

SIZE, FEATURES, CLASSES, SPATIAL = 299, 2048, 1008, 7
_EPSILON = 1e-3


class InceptionOutputs(NamedTuple):
    """All float32.

    Attributes:
      features: [B,2048], the graph's `pool_3`: what FID, KID, precision and recall are measured in.
      logits_unbiased: [B,1008], features times weights. The Inception score is taken of these: its original code leaves the bias out.
      logits: [B,1008], with the bias: what the network was trained with.
      spatial: [B,h,w,7], the first channels of the graph's `mixed_6/conv` (here Mixed_6d.branch1x1): what sFID is measured in.
        17x17 from images of 299x299.
    """

    features: Array
    logits_unbiased: Array
    logits: Array
    spatial: Array


class InceptionV3(nn.Module):
    """Images [B,H,W,3] in [-1, 1], 299x299 in every metric and at least 75x75 -> InceptionOutputs.

    Attributes:
      dtype: what convolutions and pools compute in; float32 at the highest precision of the backend. Normalisation, the last average
        and the classifier are in float32 either way.
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Array) -> InceptionOutputs:
        conv, block = (functools.partial(layer, dtype=self.dtype) for layer in (BasicConv, Mixed))
        x = conv(32, (3, 3), stride=2, padding="VALID", name="Conv2d_1a_3x3")(images)
        x = conv(32, (3, 3), padding="VALID", name="Conv2d_2a_3x3")(x)
        x = _max_pool(conv(64, (3, 3), name="Conv2d_2b_3x3")(x))
        x = conv(80, name="Conv2d_3b_1x1")(x)
        x = _max_pool(conv(192, (3, 3), padding="VALID", name="Conv2d_4a_3x3")(x))
        for name, pool in (("5b", 32), ("5c", 64), ("5d", 64)):
            x = block(_block_a(pool), pool="average", name=f"Mixed_{name}")(x)
        x = block(_BLOCK_B, pool="stride", name="Mixed_6a")(x)
        for name, middle in (("6b", 128), ("6c", 160), ("6d", 160)):
            x = block(_block_c(middle), pool="average", name=f"Mixed_{name}")(x)
        spatial = x[..., :SPATIAL]  # the first branch, branch1x1, comes first in the concatenation
        x = block(_block_c(192), pool="average", name="Mixed_6e")(x)
        x = block(_BLOCK_D, pool="stride", name="Mixed_7a")(x)
        x = block(_BLOCK_E, pool="average", name="Mixed_7b")(x)
        x = block(_BLOCK_E, pool="max", name="Mixed_7c")(x)
        features = jnp.mean(x.astype(jnp.float32), (1, 2))
        logits_unbiased, logits = Classifier(name="fc")(features)
        return InceptionOutputs(features, logits_unbiased, logits, spatial.astype(jnp.float32))


class Conv(nn.Module):
    """Convolution without bias: `weight` HWIO."""

    features: int
    kernel: tuple[int, int]
    stride: int
    padding: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        weight = self.param("weight", nn.initializers.he_normal(), (*self.kernel, x.shape[-1], self.features))
        return jax.lax.conv_general_dilated(
            x.astype(self.dtype), weight.astype(self.dtype), (self.stride, self.stride), self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=jax.lax.Precision.HIGHEST if self.dtype == jnp.float32 else None)


class BatchNorm(nn.Module):
    """Batch normalisation with the statistics of training, which are parameters here."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        ones, zeros, shape = nn.initializers.ones, nn.initializers.zeros, (x.shape[-1],)
        weight, bias = self.param("weight", ones, shape), self.param("bias", zeros, shape)
        mean, variance = self.param("running_mean", zeros, shape), self.param("running_var", ones, shape)
        scale = weight * jax.lax.rsqrt(variance + _EPSILON)
        return (x.astype(jnp.float32) - mean[None, None, None]) * scale[None, None, None] + bias[None, None, None]


class BasicConv(nn.Module):
    """Convolution, batch normalisation, rectifier: [B,H,W,in] -> [B,H',W',features]."""

    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = Conv(self.features, self.kernel, self.stride, self.padding, self.dtype, name="conv")(x)
        return nn.relu(BatchNorm(name="bn")(x)).astype(self.dtype)


class Classifier(nn.Module):
    """Features [B,F] -> logits [B,1008] without and with the bias."""

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        weight = self.param("weight", nn.initializers.lecun_normal(), (x.shape[-1], CLASSES))
        unbiased = jnp.matmul(x, weight, precision=jax.lax.Precision.HIGHEST)
        return unbiased, unbiased + self.param("bias", nn.initializers.zeros, (CLASSES,))[None]


class Step(NamedTuple):
    """A convolution of a branch, padded unless it strides; its name is the branch's followed by `suffix`."""

    suffix: str
    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


class Branch(NamedTuple):
    """Convolutions one behind the other, but the last `ends`, which stand side by side. The one named branch_pool sees the pool."""

    name: str
    steps: tuple[Step, ...]
    ends: int = 1


class Mixed(nn.Module):
    """Branches side by side, concatenated.

    Attributes:
      pool: "average" or "max", 3x3 with stride 1; "stride" is the maximum with stride 2, concatenated as it is.
    """

    branches: tuple[Branch, ...]
    pool: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        pooled = {"average": _average_pool, "max": _still_max_pool, "stride": _max_pool}[self.pool](x)
        out = []
        for branch in self.branches:
            layers = [BasicConv(step.features, step.kernel, step.stride, "SAME" if step.stride == 1 else "VALID", self.dtype,
                                name=branch.name + step.suffix) for step in branch.steps]
            y = pooled if branch.name == "branch_pool" else x
            for layer in layers[:-branch.ends]:
                y = layer(y)
            out += [layer(y) for layer in layers[-branch.ends:]]
        return jnp.concatenate([*out, pooled] if self.pool == "stride" else out, axis=-1)


_WIDE, _HIGH, _3X3 = (1, 7), (7, 1), (3, 3)


def _block_a(pool_features: int) -> tuple[Branch, ...]:
    return (Branch("branch1x1", (Step("", 64),)),
            Branch("branch5x5", (Step("_1", 48), Step("_2", 64, (5, 5)))),
            Branch("branch3x3dbl", (Step("_1", 64), Step("_2", 96, _3X3), Step("_3", 96, _3X3))),
            Branch("branch_pool", (Step("", pool_features),)))


def _block_c(middle: int) -> tuple[Branch, ...]:
    return (Branch("branch1x1", (Step("", 192),)),
            Branch("branch7x7", (Step("_1", middle), Step("_2", middle, _WIDE), Step("_3", 192, _HIGH))),
            Branch("branch7x7dbl", (Step("_1", middle), Step("_2", middle, _HIGH), Step("_3", middle, _WIDE), Step("_4", middle, _HIGH),
                                    Step("_5", 192, _WIDE))),
            Branch("branch_pool", (Step("", 192),)))


_BLOCK_B = (Branch("branch3x3", (Step("", 384, _3X3, 2),)),
            Branch("branch3x3dbl", (Step("_1", 64), Step("_2", 96, _3X3), Step("_3", 96, _3X3, 2))))
_BLOCK_D = (Branch("branch3x3", (Step("_1", 192), Step("_2", 320, _3X3, 2))),
            Branch("branch7x7x3", (Step("_1", 192), Step("_2", 192, _WIDE), Step("_3", 192, _HIGH), Step("_4", 192, _3X3, 2))))
_BLOCK_E = (Branch("branch1x1", (Step("", 320),)),
            Branch("branch3x3", (Step("_1", 384), Step("_2a", 384, (1, 3)), Step("_2b", 384, (3, 1))), ends=2),
            Branch("branch3x3dbl", (Step("_1", 448), Step("_2", 384, _3X3), Step("_3a", 384, (1, 3)), Step("_3b", 384, (3, 1))), ends=2),
            Branch("branch_pool", (Step("", 192),)))


def _max_pool(x: Array) -> Array:
    return nn.max_pool(x, _3X3, (2, 2), "VALID")


def _still_max_pool(x: Array) -> Array:
    return nn.max_pool(x, _3X3, (1, 1), "SAME")


def _average_pool(x: Array) -> Array:
    return nn.avg_pool(x, _3X3, (1, 1), "SAME", count_include_pad=False)
