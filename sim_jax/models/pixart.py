"""PixArt-alpha, the text-conditional diffusion transformer (Chen et al. 2023, arXiv 2310.00426), with adaLN-single.

    e = t_embedder(t),   m = t_block(silu(e))                one MLP for all blocks: six modulations [B,6,D]
    block i:  (shift_1, scale_1, gate_1, shift_2, scale_2, gate_2) = m + scale_shift_table_i
              x <- x + gate_1 attn(modulate(x; shift_1, scale_1))
              x <- x + cross_attn(x, captions)                  over the tokens that the caption's mask has
              x <- x + gate_2 mlp(modulate(x; shift_2, scale_2))
    last:     (shift, scale) = e + scale_shift_table

Captions are a text encoder's last states (T5-XXL's: 4096 channels, up to 120 tokens). Names are those of PixArt-alpha/PixArt-alpha
(`diffusion/model/nets/PixArt.py`), which Score Implicit Matching's release shares. The 1024-pixel network also knows the image's size:
e <- e + [csize_embedder(height), csize_embedder(width), ar_embedder(height / width)], a third of the channels each (`micro_conditions`).
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from sim_jax.models import layers, memory, transformer
from sim_jax.types import Array, Key


class PixArt(nn.Module):
    """Noise- and text-conditional transformer, x [B,H,W,in_channels] -> [B,H,W,out_channels].

    Attributes:
      img_resolution: H = W that it is made for, in latent pixels; other sizes can be given, too.
      in_channels, out_channels: channels of input and output.
      patch_size: side of a token.
      hidden_size, depth, num_heads, mlp_ratio: channels of a token, blocks, heads, and the hidden layer's width over the token's.
      caption_channels: width of the text encoder.
      caption_tokens: length of the learned null caption, and so of captions while it is used; 0 is a network without one.
      interpolation_scale: of the positions (`transformer.positions`); 2 for 1024 pixels.
      micro_conditions: whether the image's size is a condition.
      pixels_per_latent: what sizes are multiplied by for it.
      scaling_factor: of the autoencoder whose latents it denoises; without effect here.
      label_dropout: probability that the null caption replaces a caption, in effect where `dropout_keys` is given.
      dtype: what tokens are computed in.
      remat: what each block keeps for the backward pass, of `memory.POLICIES`.
    """

    img_resolution: int
    in_channels: int
    out_channels: int
    patch_size: int = 2
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    caption_channels: int = 4096
    caption_tokens: int = 120
    interpolation_scale: float = 1.0
    micro_conditions: bool = False
    pixels_per_latent: int = 8
    scaling_factor: float = 0.18215
    label_dropout: float = 0.1
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"

    @nn.nowrap
    def positions(self) -> Array:
        """The fixed positions of an image of img_resolution, [1,N,hidden_size]; PyTorch keeps them as a buffer."""
        side = self.img_resolution // self.patch_size
        return transformer.positions(side, side, self.hidden_size, base=side, scale=self.interpolation_scale)[None]

    @nn.compact
    def __call__(self, x: Array, noise_labels: Array, class_labels: Array | None = None, augment_labels: Array | None = None,
                 dropout_keys: Key | None = None, *, text: Array | None = None, text_mask: Array | None = None,
                 size: Array | None = None) -> Array:
        """Shapes: x [B,H,W,C]; noise_labels [B]; keys [B]. `class_labels` and `augment_labels` have no effect.

        Args:
          text: captions [B,L,caption_channels]; None is the null caption.
          text_mask: [B,L], nonzero where a caption has a token; None: everywhere. The null caption keeps the mask of the caption that it
            replaces, as in training.
          size: [B,2], height and width in pixels, for micro_conditions; None: those of x.
        Returns: [B,H,W,out_channels].
        Raises: ValueError for captions or masks of another shape.
        """
        b, height, width, _ = x.shape
        text, text_mask = _check_captions(self, b, text, text_mask)
        embedder = CaptionEmbedder(self.hidden_size, self.caption_channels, self.caption_tokens, self.label_dropout, self.dtype,
                                   name="y_embedder")
        captions = embedder(b, text, dropout_keys)
        emb = transformer.ScalarEmbedder(self.hidden_size, name="t_embedder")(noise_labels)
        if self.micro_conditions:
            pixels = jnp.asarray([[height, width]], jnp.float32) * self.pixels_per_latent
            emb = emb + _sizes(self.hidden_size // 3, jnp.broadcast_to(pixels, (b, 2)) if size is None else size.astype(jnp.float32))
        modulation = layers.Scope(name="t_block")(
            lambda: layers.Linear(6 * self.hidden_size, init=transformer.SMALL, name="1")(nn.silu(emb)))
        modulation = modulation.reshape(b, 6, self.hidden_size)

        base = self.img_resolution // self.patch_size
        x = layers.Scope(name="x_embedder")(lambda: transformer.patchify(
            x, self.hidden_size, self.patch_size, dtype=self.dtype, base=base, scale=self.interpolation_scale))
        x = layers.Scope(name="blocks")(_blocks, self, x, captions, modulation, text_mask)
        x = FinalLayer(self.patch_size**2 * self.out_channels, dtype=self.dtype, name="final_layer")(x, emb)
        return transformer.unpatchify(x, height, width, self.patch_size)


def _check_captions(net: PixArt, batch: int, text: Array | None, text_mask: Array | None) -> tuple[Array | None, Array | None]:
    """Text, or None for the null caption, and the mask [B,L] of bool, or None."""
    if text is None and not net.caption_tokens:
        if not net.is_initializing():
            raise ValueError("cond.text: got None, allowed: [B,L,caption_channels], since the network has no null caption")
        text = jnp.zeros((batch, 1, net.caption_channels))
    tokens = net.caption_tokens if text is None else text.shape[1]
    if text is not None and text.shape != (batch, tokens, net.caption_channels):
        raise ValueError(f"cond.text: got shape {text.shape}, allowed: {(batch, 'tokens', net.caption_channels)}")
    if text_mask is None:
        return text, None
    if text_mask.shape != (batch, tokens):
        raise ValueError(f"cond.text_mask: got shape {text_mask.shape}, allowed: {(batch, tokens)}")
    return text, text_mask.astype(bool)


def _sizes(features: int, size: Array) -> Array:
    """[B,2] -> [B, 3 features]; makes the submodules `csize_embedder` and `ar_embedder`."""
    sides = transformer.ScalarEmbedder(features, name="csize_embedder")(size.reshape(-1)).reshape(size.shape[0], 2 * features)
    return jnp.concatenate([sides, transformer.ScalarEmbedder(features, name="ar_embedder")(size[:, 0] / size[:, 1])], -1)


class CaptionEmbedder(nn.Module):
    """Captions [B,L,caption_channels], or None for the null caption, -> [B,L,features]; `y_embedding` is [caption_channels, L]."""

    features: int
    caption_channels: int
    tokens: int
    dropout: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, batch: int, text: Array | None, keys: Key | None) -> Array:
        if self.tokens:
            init = nn.initializers.normal(1 / math.sqrt(self.caption_channels))
            null = memory.parameter(self, "y_embedding", init, (self.caption_channels, self.tokens), self.dtype).T[None]
            text = jnp.broadcast_to(null, (batch, *null.shape[1:])) if text is None else self._drop(text.astype(self.dtype), null, keys)
        return transformer.Mlp(self.features, self.features, init=transformer.SMALL, dtype=self.dtype, name="y_proj")(text)

    def _drop(self, text: Array, null: Array, keys: Key | None) -> Array:
        keep = layers.kept_conditions(self.dropout, keys)
        if keep is None:
            return text
        if text.shape[1] != self.tokens:
            raise ValueError(f"cond.text: got {text.shape[1]} tokens, allowed with label_dropout: {self.tokens}, as the null caption has")
        return jnp.where(keep[:, None, None], text, null)


class CrossAttention(nn.Module):
    """Attention of tokens [B,N,D] to captions [B,L,D] where mask [B,L] is true; -> [B,N,D]."""

    num_heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, captions: Array, mask: Array | None) -> Array:
        b, n, d = x.shape
        heads = (self.num_heads, d // self.num_heads)
        q = layers.Linear(d, init=transformer.XAVIER, dtype=self.dtype, name="q_linear")(x).reshape(b, n, *heads)
        # As for self-attention, the keys' bias is without effect.
        kv = layers.Linear(2 * d, still_bias=(2, 0), init=transformer.XAVIER, dtype=self.dtype, name="kv_linear")(captions)
        k, v = jnp.moveaxis(kv.reshape(b, -1, 2, *heads), 2, 0)
        h = jax.nn.dot_product_attention(q, k, v, mask=None if mask is None else mask[:, None, None])
        return layers.Linear(d, init=transformer.ZERO, dtype=self.dtype, name="proj")(h.reshape(b, n, d))


def _table(module: nn.Module, rows: int, features: int) -> Array:
    """`scale_shift_table` as [1, rows, features]."""
    return memory.parameter(module, "scale_shift_table", nn.initializers.normal(1 / math.sqrt(features)), (features, rows)).T[None]


class Block(nn.Module):
    """The module docstring's block: x [B,N,D], captions [B,L,D], modulation [B,6,D], mask [B,L] -> [B,N,D]."""

    num_heads: int
    mlp_ratio: float = 4.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, captions: Array, modulation: Array, mask: Array | None) -> Array:
        d = x.shape[-1]
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation + _table(self, 6, d), 6, axis=1)
        h = transformer.SelfAttention(self.num_heads, dtype=self.dtype, name="attn")(transformer.modulate(x, shift1, scale1))
        x = x + gate1.astype(x.dtype) * h
        x = x + CrossAttention(self.num_heads, dtype=self.dtype, name="cross_attn")(x, captions, mask)
        mlp = transformer.Mlp(int(d * self.mlp_ratio), d, dtype=self.dtype, name="mlp")
        return x + gate2.astype(x.dtype) * mlp(transformer.modulate(x, shift2, scale2))


def _blocks(net: PixArt, x: Array, captions: Array, modulation: Array, mask: Array | None) -> Array:
    cls = memory.block(Block, net.remat)
    for i in range(net.depth):
        x = cls(net.num_heads, net.mlp_ratio, dtype=net.dtype, name=str(i))(x, captions, modulation, mask)
    return x


class FinalLayer(nn.Module):
    """Tokens [B,N,D] and the embedding [B,D] -> [B,N,features]."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, emb: Array) -> Array:
        shift, scale = jnp.split(emb[:, None] + _table(self, 2, x.shape[-1]), 2, axis=1)
        return layers.Linear(self.features, init=transformer.ZERO, dtype=self.dtype, name="linear")(
            transformer.modulate(x, shift, scale))
