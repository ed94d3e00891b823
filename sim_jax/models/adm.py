"""ADM (Dhariwal and Nichol 2021, arXiv 2105.05233), as reimplemented in EDM's public code (`DhariwalUNet`).

Constructor arguments and submodule names are that code's; see `sim_jax.models.song_unet` for how names map.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from sim_jax.models import layers, memory
from sim_jax.types import Array, Key

_INIT = layers.Init("kaiming_uniform", weight=float(np.sqrt(1 / 3)), bias=float(np.sqrt(1 / 3)))
_INIT_ZERO = layers.Init("kaiming_uniform", weight=0.0)
_CHANNELS_PER_HEAD = 64


class DhariwalUNet(nn.Module):
    """Noise-conditional U-Net, x [B,H,W,in_channels] -> [B,H,W,out_channels].

    Attributes:
      img_resolution: H = W, in pixels.
      in_channels, out_channels: colour channels of input and output.
      label_dim: number of classes; 0 is unconditional.
      augment_dim: width of the augmentation labels; 0 is none.
      model_channels, channel_mult, channel_mult_emb: width, its factor per resolution, and the embedding's factor.
      num_blocks: residual blocks per resolution.
      attn_resolutions: resolutions that attend, with 64 channels per head.
      dropout, label_dropout: probabilities, in effect where `dropout_keys` is given.
      dtype: what convolutions and attention compute in.
      remat: what each block keeps for the backward pass, of `memory.POLICIES`.
    """

    img_resolution: int
    in_channels: int
    out_channels: int
    label_dim: int = 0
    augment_dim: int = 0
    model_channels: int = 192
    channel_mult: Sequence[int] = (1, 2, 3, 4)
    channel_mult_emb: int = 4
    num_blocks: int = 3
    attn_resolutions: Sequence[int] = (32, 16, 8)
    dropout: float = 0.10
    label_dropout: float = 0.0
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
        emb_channels = self.model_channels * self.channel_mult_emb
        emb = layers.positional_embedding(noise_labels, self.model_channels)
        if self.augment_dim:
            emb = emb + layers.Linear(self.model_channels, bias=False, init=_INIT_ZERO, name="map_augment")(augment_labels)
        emb = nn.silu(layers.Linear(emb_channels, init=_INIT, name="map_layer0")(emb))
        emb = layers.Linear(emb_channels, init=_INIT, name="map_layer1")(emb)
        if self.label_dim:
            init = layers.Init("kaiming_normal", weight=float(np.sqrt(self.label_dim)))
            labels = layers.drop_labels(class_labels, self.label_dropout, dropout_keys)
            emb = emb + layers.Linear(emb_channels, bias=False, init=init, name="map_label")(labels)
        emb = nn.silu(emb)

        x, skips = layers.Scope(name="enc")(_encode, self, x, emb, dropout_keys)
        if encode_only:
            return skips[self.num_blocks :: self.num_blocks + 1]
        x = layers.Scope(name="dec")(_decode, self, x, skips, emb, dropout_keys)
        x = nn.silu(layers.GroupNorm(dtype=self.dtype, name="out_norm")(x))
        return layers.Conv2d(self.out_channels, 3, init=_INIT_ZERO, dtype=self.dtype, name="out_conv")(x)


def _block(net: DhariwalUNet, out_channels: int, name: str, *, attention: bool = False, **resample) -> layers.UNetBlock:
    cls = memory.block(layers.UNetBlock, net.remat)
    heads = out_channels // _CHANNELS_PER_HEAD if attention else 0
    return cls(out_channels, num_heads=heads, dropout=net.dropout, init=_INIT, init_zero=_INIT_ZERO, dtype=net.dtype,
               name=name, **resample)


def _encode(net: DhariwalUNet, x: Array, emb: Array, keys: Key | None) -> tuple[Array, list[Array]]:
    """[B,H,W,C] -> the lowest resolution's activations, and one skip per block, highest resolution first."""
    skips = []
    for level, mult in enumerate(net.channel_mult):
        res = net.img_resolution >> level
        if level == 0:
            x = layers.Conv2d(net.model_channels * mult, 3, init=_INIT, dtype=net.dtype, name=f"{res}x{res}_conv")(x)
        else:
            x = _block(net, x.shape[-1], f"{res}x{res}_down", down=True)(x, emb, keys)
        skips.append(x)
        for idx in range(net.num_blocks):
            attention = res in net.attn_resolutions
            x = _block(net, net.model_channels * mult, f"{res}x{res}_block{idx}", attention=attention)(x, emb, keys)
            skips.append(x)
    return x, skips


def _decode(net: DhariwalUNet, x: Array, skips: list[Array], emb: Array, keys: Key | None) -> Array:
    """The lowest resolution's activations and the skips -> [B,H,W,model_channels * channel_mult[0]]."""
    lowest = len(net.channel_mult) - 1
    for level, mult in reversed(list(enumerate(net.channel_mult))):
        res = net.img_resolution >> level
        if level == lowest:
            x = _block(net, x.shape[-1], f"{res}x{res}_in0", attention=True)(x, emb, keys)
            x = _block(net, x.shape[-1], f"{res}x{res}_in1")(x, emb, keys)
        else:
            x = _block(net, x.shape[-1], f"{res}x{res}_up", up=True)(x, emb, keys)
        for idx in range(net.num_blocks + 1):
            x = jnp.concatenate([x, skips.pop()], axis=-1)
            attention = res in net.attn_resolutions
            x = _block(net, net.model_channels * mult, f"{res}x{res}_block{idx}", attention=attention)(x, emb, keys)
    return x
