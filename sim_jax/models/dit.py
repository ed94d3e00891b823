"""DiT, the class-conditional diffusion transformer (Peebles and Xie 2022, arXiv 2212.09748), with adaLN-Zero blocks.

    c = t_embedder(t) + y_embedder(y)        six modulations of every block, two of the last layer: linear in silu(c)
    x <- x + gate_1 attn(modulate(x; shift_1, scale_1)),    x <- x + gate_2 mlp(modulate(x; shift_2, scale_2))

Names are those of facebookresearch/DiT (`models.py`); the released networks work on 4 latent channels and predict noise and variance,
8 channels. "No label" is the last column of the label table. The noise level's frequencies are that code's, 10000^(-i / 128); diffusers'
class has 10000^(-i / 127) for the same weights.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from sim_jax.models import layers, memory, transformer
from sim_jax.types import Array, Key

_SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}


def variant(name: str) -> dict[str, int]:
    """The keyword arguments of a member of the family, such as "DiT-XL/2". Raises: ValueError for another name."""
    size, _, patch = name.removeprefix("DiT-").partition("/")
    if size not in _SIZES or patch not in ("2", "4", "8"):
        raise ValueError(f"variant: got {name!r}, allowed: DiT-{{{','.join(_SIZES)}}}/{{2,4,8}}")
    hidden_size, depth, num_heads = _SIZES[size]
    return {"hidden_size": hidden_size, "depth": depth, "num_heads": num_heads, "patch_size": int(patch)}


class DiT(nn.Module):
    """Noise-conditional transformer, x [B,H,W,in_channels] -> [B,H,W,out_channels].

    Attributes:
      img_resolution: H = W that it is made for, in latent pixels.
      in_channels, out_channels: channels of input and output.
      label_dim: number of classes.
      patch_size: side of a token.
      hidden_size, depth, num_heads, mlp_ratio: channels of a token, blocks, heads, and the hidden layer's width over the token's.
      scaling_factor: of the autoencoder whose latents it denoises; without effect here.
      label_dropout: probability of "no label", in effect where `dropout_keys` is given.
      dtype: what tokens are computed in.
      remat: what each block keeps for the backward pass, of `memory.POLICIES`.
    """

    img_resolution: int
    in_channels: int
    out_channels: int
    label_dim: int = 1000
    patch_size: int = 2
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    scaling_factor: float = 0.18215
    label_dropout: float = 0.1
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"

    @nn.nowrap
    def positions(self) -> Array:
        """The fixed positions of an image of img_resolution, [1,N,hidden_size]; PyTorch keeps them as a buffer."""
        side = self.img_resolution // self.patch_size
        return transformer.positions(side, side, self.hidden_size, base=side)[None]

    @nn.compact
    def __call__(self, x: Array, noise_labels: Array, class_labels: Array | None = None, augment_labels: Array | None = None,
                 dropout_keys: Key | None = None) -> Array:
        """Shapes: x [B,H,W,C]; noise_labels [B]; class_labels [B,label_dim], zeros for none; keys [B]. `augment_labels` has no effect."""
        b, height, width, _ = x.shape
        labels = jnp.zeros((b, self.label_dim)) if class_labels is None else class_labels
        labels = layers.drop_labels(labels.astype(jnp.float32), self.label_dropout, dropout_keys)
        c = transformer.ScalarEmbedder(self.hidden_size, name="t_embedder")(noise_labels)
        c = nn.silu(c + layers.Scope(name="y_embedder")(lambda: Embedding(self.hidden_size, name="embedding_table")(labels)))

        base = self.img_resolution // self.patch_size
        x = layers.Scope(name="x_embedder")(
            lambda: transformer.patchify(x, self.hidden_size, self.patch_size, dtype=self.dtype, base=base))
        x = layers.Scope(name="blocks")(_blocks, self, x, c)
        x = layers.Scope(name="final_layer")(_final, self, x, c)
        return transformer.unpatchify(x, height, width, self.patch_size)


class Embedding(nn.Module):
    """One-hot labels [B,K], zeros for none, -> [B, features], in float32; `weight` is [features, K + 1]."""

    features: int

    @nn.compact
    def __call__(self, labels: Array) -> Array:
        labels = jnp.concatenate([labels, 1 - jnp.sum(labels, -1, keepdims=True)], -1)
        return labels @ memory.parameter(self, "weight", nn.initializers.normal(0.02), (self.features, labels.shape[-1])).T


class Block(nn.Module):
    """The module docstring's line, x [B,N,D] and c [B,D] -> [B,N,D]."""

    num_heads: int
    mlp_ratio: float = 4.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, c: Array) -> Array:
        d = x.shape[-1]
        shift1, scale1, gate1, shift2, scale2, gate2 = _modulations(c, 6 * d, self.dtype)
        h = transformer.SelfAttention(self.num_heads, dtype=self.dtype, name="attn")(transformer.modulate(x, shift1, scale1))
        x = x + gate1.astype(x.dtype) * h
        mlp = transformer.Mlp(int(d * self.mlp_ratio), d, dtype=self.dtype, name="mlp")
        return x + gate2.astype(x.dtype) * mlp(transformer.modulate(x, shift2, scale2))


def _modulations(c: Array, features: int, dtype: Any) -> list[Array]:
    """[B,D] -> features / D arrays [B,1,D] in float32; makes the submodule `adaLN_modulation`."""
    linear = layers.Scope(name="adaLN_modulation")(
        lambda: layers.Linear(features, init=transformer.ZERO, dtype=dtype, name="1")(c))
    return jnp.split(linear.astype(jnp.float32)[:, None], features // c.shape[-1], axis=-1)


def _blocks(net: DiT, x: Array, c: Array) -> Array:
    cls = memory.block(Block, net.remat)
    for i in range(net.depth):
        x = cls(net.num_heads, net.mlp_ratio, dtype=net.dtype, name=str(i))(x, c)
    return x


def _final(net: DiT, x: Array, c: Array) -> Array:
    shift, scale = _modulations(c, 2 * net.hidden_size, net.dtype)
    features = net.patch_size**2 * net.out_channels
    return layers.Linear(features, init=transformer.ZERO, dtype=net.dtype, name="linear")(transformer.modulate(x, shift, scale))
