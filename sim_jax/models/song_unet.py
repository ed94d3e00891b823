"""DDPM++ and NCSN++ (Song et al. 2021, arXiv 2011.13456), as reimplemented in EDM's public code (`SongUNet`).

Constructor arguments and submodule names are that code's: `enc.16x16_block0.conv0.weight` there is
`params["enc"]["16x16_block0"]["conv0"]["weight"]` here.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from sim_jax.models import layers, memory
from sim_jax.types import Array, Key

_INIT = layers.Init("xavier_uniform")
_INIT_ZERO = layers.Init("xavier_uniform", weight=1e-5)
_INIT_ATTN = layers.Init("xavier_uniform", weight=float(np.sqrt(0.2)))


class SongUNet(nn.Module):
    """Noise-conditional U-Net, x [B,H,W,in_channels] -> [B,H,W,out_channels].

    Attributes:
      img_resolution: H = W, in pixels.
      in_channels, out_channels: colour channels of input and output.
      label_dim: number of classes; 0 is unconditional.
      augment_dim: width of the augmentation labels; 0 is none.
      model_channels, channel_mult, channel_mult_emb: width, its factor per resolution, and the embedding's factor.
      num_blocks: residual blocks per resolution.
      attn_resolutions: resolutions that attend.
      dropout, label_dropout: probabilities, in effect where `dropout_keys` is given.
      embedding_type: "positional" (DDPM++) or "fourier" (NCSN++).
      channel_mult_noise: width of the noise embedding: 1 for DDPM++, 2 for NCSN++.
      encoder_type: "standard" (DDPM++), "skip" or "residual" (NCSN++).
      decoder_type: "standard" or "skip".
      resample_filter: (1, 1) for DDPM++, (1, 3, 3, 1) for NCSN++.
      dtype: what convolutions and attention compute in.
      remat: what each block keeps for the backward pass, of `memory.POLICIES`.
    """

    img_resolution: int
    in_channels: int
    out_channels: int
    label_dim: int = 0
    augment_dim: int = 0
    model_channels: int = 128
    channel_mult: Sequence[int] = (1, 2, 2, 2)
    channel_mult_emb: int = 4
    num_blocks: int = 4
    attn_resolutions: Sequence[int] = (16,)
    dropout: float = 0.10
    label_dropout: float = 0.0
    embedding_type: str = "positional"
    channel_mult_noise: int = 1
    encoder_type: str = "standard"
    decoder_type: str = "standard"
    resample_filter: Sequence[float] = (1, 1)
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"

    @property
    def feature_channels(self) -> dict[int, int]:
        """Channels of the encoder's map at each resolution, the highest first."""
        return layers.feature_channels(self.img_resolution, self.model_channels, self.channel_mult)

    @nn.compact
    def __call__(self, x: Array, noise_labels: Array, class_labels: Array | None = None,
                 augment_labels: Array | None = None, dropout_keys: Key | None = None, *,
                 encode_only: bool = False) -> Array | list[Array]:
        """Shapes: x [B,H,W,C]; noise_labels [B]; class_labels [B,label_dim]; augment_labels [B,augment_dim]; keys [B].

        Returns: [B,H,W,out_channels]; with `encode_only` the output of the encoder's last block at each resolution, the highest
        first, and nothing behind the encoder is computed.
        """
        noise_channels = self.model_channels * self.channel_mult_noise
        emb_channels = self.model_channels * self.channel_mult_emb
        if self.embedding_type == "positional":
            emb = layers.positional_embedding(noise_labels, noise_channels, endpoint=True)
        else:
            emb = layers.FourierEmbedding(noise_channels, name="map_noise")(noise_labels)
        emb = jnp.roll(emb, noise_channels // 2, axis=1)  # this network wants the sines first
        if self.label_dim:
            labels = layers.drop_labels(class_labels, self.label_dropout, dropout_keys) * float(np.sqrt(self.label_dim))
            emb = emb + layers.Linear(noise_channels, init=_INIT, name="map_label")(labels)
        if self.augment_dim:
            emb = emb + layers.Linear(noise_channels, bias=False, init=_INIT, name="map_augment")(augment_labels)
        emb = nn.silu(layers.Linear(emb_channels, init=_INIT, name="map_layer0")(emb))
        emb = nn.silu(layers.Linear(emb_channels, init=_INIT, name="map_layer1")(emb))

        x, skips = layers.Scope(name="enc")(_encode, self, x, emb, dropout_keys)
        if encode_only:
            return skips[self.num_blocks :: self.num_blocks + 1]
        return layers.Scope(name="dec")(_decode, self, x, skips, emb, dropout_keys)


def _block(net: SongUNet, out_channels: int, name: str, *, attention: bool = False, **resample) -> layers.UNetBlock:
    return memory.block(layers.UNetBlock, net.remat)(
        out_channels, num_heads=int(attention), dropout=net.dropout, skip_scale=float(np.sqrt(0.5)), eps=1e-6,
        resample_filter=tuple(net.resample_filter), resample_proj=True, adaptive_scale=False, init=_INIT,
        init_zero=_INIT_ZERO, init_attn=_INIT_ATTN, dtype=net.dtype, name=name, **resample)


def _conv(net: SongUNet, features: int, kernel: int, name: str, *, init: layers.Init = _INIT, **resample) -> layers.Conv2d:
    return layers.Conv2d(features, kernel, resample_filter=tuple(net.resample_filter), init=init, dtype=net.dtype,
                         name=name, **resample)


def _encode(net: SongUNet, x: Array, emb: Array, keys: Key | None) -> tuple[Array, list[Array]]:
    """[B,H,W,C] -> the lowest resolution's activations, and one skip per block, highest resolution first."""
    skips, aux = [], x
    for level, mult in enumerate(net.channel_mult):
        res = net.img_resolution >> level
        at = f"{res}x{res}"
        if level == 0:
            x = _conv(net, net.model_channels, 3, f"{at}_conv")(x)
            skips.append(x)
        else:
            x = _block(net, x.shape[-1], f"{at}_down", down=True)(x, emb, keys)
            skips.append(x)
            if net.encoder_type == "skip":
                aux = _conv(net, aux.shape[-1], 0, f"{at}_aux_down", down=True)(aux)
                x = skips[-1] = x + _conv(net, x.shape[-1], 1, f"{at}_aux_skip")(aux)
            elif net.encoder_type == "residual":
                residual = _conv(net, x.shape[-1], 3, f"{at}_aux_residual", down=True, fused_down=True)(aux)
                x = skips[-1] = aux = (x + residual) * float(np.sqrt(0.5))
        for idx in range(net.num_blocks):
            attention = res in net.attn_resolutions
            x = _block(net, net.model_channels * mult, f"{at}_block{idx}", attention=attention)(x, emb, keys)
            skips.append(x)
    return x, skips


def _decode(net: SongUNet, x: Array, skips: list[Array], emb: Array, keys: Key | None) -> Array:
    """The lowest resolution's activations and the skips -> [B,H,W,out_channels]."""
    aux, lowest = None, len(net.channel_mult) - 1
    for level, mult in reversed(list(enumerate(net.channel_mult))):
        res = net.img_resolution >> level
        at = f"{res}x{res}"
        if level == lowest:
            x = _block(net, x.shape[-1], f"{at}_in0", attention=True)(x, emb, keys)
            x = _block(net, x.shape[-1], f"{at}_in1")(x, emb, keys)
        else:
            x = _block(net, x.shape[-1], f"{at}_up", up=True)(x, emb, keys)
        for idx in range(net.num_blocks + 1):
            x = jnp.concatenate([x, skips.pop()], axis=-1)
            attention = idx == net.num_blocks and res in net.attn_resolutions
            x = _block(net, net.model_channels * mult, f"{at}_block{idx}", attention=attention)(x, emb, keys)
        if net.decoder_type == "skip" or level == 0:
            if aux is not None:
                aux = _conv(net, net.out_channels, 0, f"{at}_aux_up", up=True)(aux)
            h = nn.silu(layers.GroupNorm(eps=1e-6, dtype=net.dtype, name=f"{at}_aux_norm")(x))
            h = _conv(net, net.out_channels, 3, f"{at}_aux_conv", init=_INIT_ZERO)(h)
            aux = h if aux is None else h + aux
    return aux
