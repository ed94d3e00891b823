"""A residual network for points: data of dimension D are images [B,1,1,D].

The noise level and the class enter as in EDM's DDPM++ (Karras et al. 2022, arXiv 2206.00364, appendix F), and every block is
modulated by them as the transformer's of DiT (Peebles and Xie 2022, arXiv 2212.09748), without attention:

    h <- h + W silu( (1 + scale(emb)) norm(h) + shift(emb) ),      norm(h) = (h - mean) / std over the channels
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from sim_jax.models import layers, memory
from sim_jax.types import Array, Key

_INIT = layers.Init("kaiming_uniform", weight=float(np.sqrt(1 / 3)), bias=float(np.sqrt(1 / 3)))
_INIT_ZERO = layers.Init("kaiming_uniform", weight=0.0)
_EPS = 1e-5


class MLP(nn.Module):
    """Noise-conditional network of all pixels at once, x [B,H,W,in_channels] -> [B,H,W,out_channels].

    Attributes:
      img_resolution: H = W; 1 for points.
      in_channels, out_channels: colour channels, or dimensions, of input and output.
      label_dim: number of classes; 0 is unconditional.
      model_channels, channel_mult_emb: width of the hidden layers, and the embedding's over it.
      num_blocks: residual layers.
      input_frequencies: how many octaves of sines and cosines of x stand beside it (Tancik et al. 2020, arXiv 2006.10739): without them
        a network of this kind is slow to learn what changes several times over the data's width.
      dropout, label_dropout: probabilities, in effect where `dropout_keys` is given.
      embedding_type: of the noise level, "positional" or "fourier".
      channel_mult_noise: width of the noise embedding, over model_channels.
      dtype: what the hidden layers compute in.
      remat: what each block keeps for the backward pass, of `memory.POLICIES`.
    """

    img_resolution: int
    in_channels: int
    out_channels: int
    label_dim: int = 0
    model_channels: int = 128
    channel_mult_emb: int = 1
    num_blocks: int = 4
    input_frequencies: int = 4
    dropout: float = 0.0
    label_dropout: float = 0.0
    embedding_type: str = "positional"
    channel_mult_noise: int = 1
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"

    @property
    def feature_channels(self) -> dict[int, int]:
        """One map of one pixel: the last hidden layer."""
        return {1: self.model_channels}

    @nn.compact
    def __call__(self, x: Array, noise_labels: Array, class_labels: Array | None = None, augment_labels: Array | None = None,
                 dropout_keys: Key | None = None, *, encode_only: bool = False) -> Array | list[Array]:
        """Shapes: x [B,H,W,C]; noise_labels [B]; class_labels [B,label_dim]; keys [B]. `augment_labels` has no effect.

        Returns: [B,H,W,out_channels]; with `encode_only` the last hidden layer alone, in a list, [B,1,1,model_channels].
        """
        noise_channels, emb_channels = self.model_channels * self.channel_mult_noise, self.model_channels * self.channel_mult_emb
        if self.embedding_type == "positional":
            emb = layers.positional_embedding(noise_labels, noise_channels, endpoint=True)
        else:
            emb = layers.FourierEmbedding(noise_channels, name="map_noise")(noise_labels)
        if self.label_dim:
            labels = layers.drop_labels(class_labels, self.label_dropout, dropout_keys) * float(np.sqrt(self.label_dim))
            emb = emb + layers.Linear(noise_channels, init=_INIT, name="map_label")(labels)
        emb = nn.silu(layers.Linear(emb_channels, init=_INIT, name="map_layer0")(emb))
        emb = nn.silu(layers.Linear(emb_channels, init=_INIT, name="map_layer1")(emb))

        h = layers.Scope(name="enc")(_encode, self, x.reshape(x.shape[0], -1), emb, dropout_keys)
        if encode_only:
            return [h[:, None, None]]
        shape = (*x.shape[:-1], self.out_channels)
        return layers.Linear(int(np.prod(shape[1:])), init=_INIT_ZERO, dtype=self.dtype, name="out")(nn.silu(_norm(h))).reshape(shape)


class Block(nn.Module):
    """The module docstring's line, [B,C] and [B,E] -> [B,C]."""

    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, h: Array, emb: Array, dropout_keys: Key | None = None) -> Array:
        channels = h.shape[-1]
        scale, shift = jnp.split(layers.Linear(2 * channels, init=_INIT, name="affine")(emb).astype(self.dtype), 2, axis=-1)
        y = nn.silu(shift + _norm(h) * (scale + 1))
        y = layers.dropout(y, self.dropout, dropout_keys, "/".join(self.path))
        return h + layers.Linear(channels, init=_INIT_ZERO, dtype=self.dtype, name="linear")(y)


def _norm(h: Array) -> Array:
    """Zero mean and variance one over the channels, statistics in float32."""
    x = h.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return (x * layers.inverse_sqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + _EPS)).astype(h.dtype)


def _encode(net: MLP, x: Array, emb: Array, keys: Key | None) -> Array:
    """[B,D] -> [B,model_channels]."""
    waves = [wave(2.0**j * x) for j in range(net.input_frequencies) for wave in (jnp.sin, jnp.cos)]
    x = jnp.concatenate([x, *waves], axis=1)
    h = layers.Linear(net.model_channels, init=_INIT, dtype=net.dtype, name="in")(x)
    cls = memory.block(Block, net.remat)
    for idx in range(net.num_blocks):
        h = cls(dropout=net.dropout, dtype=net.dtype, name=f"block{idx}")(h, emb, keys)
    return h
