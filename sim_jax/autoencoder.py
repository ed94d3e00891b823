"""From an autoencoder's description to pure functions between images and the latents that diffusion models work on.

A description is what `network.json` holds of it, for instance Stable Diffusion's:

    {"model_type": "AutoencoderKL", "img_channels": 3, "latent_channels": 4, "block_out_channels": [128, 256, 512, 512],
     "layers_per_block": 2, "norm_num_groups": 32, "scaling_factor": 0.18215}
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sim_jax.models import memory, vae
from sim_jax.types import Array, Key, Params

MODEL_TYPE = "AutoencoderKL"
_MODULE_ONLY = ("dtype", "remat", "parent", "name")
_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, eq=False)
class Autoencoder:
    """Encoder and decoder as functions of their parameters.

    Attributes:
      spec: the description it was built from, defaults filled in.
      module: the flax module.
      gather: where parameters are cut over devices, what makes one of them whole right before its layer uses it; None elsewhere.
    """

    spec: Mapping[str, Any]
    module: vae.AutoencoderKL
    gather: memory.Gather | None = None

    @property
    def factor(self) -> int:
        """Pixels per latent pixel, along each side."""
        return 1 << (len(self.spec["block_out_channels"]) - 1)

    def init(self, key: Key) -> Params:
        """Random parameters, float32, under diffusers' names."""
        images = jnp.zeros((1, self.factor, self.factor, self.spec["img_channels"]))
        return self.module.init(key, images, jnp.zeros((1, 1, 1, self.spec["latent_channels"])))["params"]

    def shapes(self) -> Params:
        """The tree of `init`, as ShapeDtypeStructs; computes nothing."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def num_params(self) -> int:
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.shapes()))

    def posterior(self, params: Params, images: Array) -> tuple[Array, Array]:
        """Mean and log variance, [B,h,w,c] float32 each and not scaled, of images [B,H,W,C] in [-1, 1].

        Raises: ValueError for sides that are no multiples of `factor`.
        """
        if images.shape[1] % self.factor or images.shape[2] % self.factor:
            raise ValueError(f"images: got {images.shape[1]}x{images.shape[2]}, allowed: multiples of {self.factor}")
        with memory.gathering(self.gather):
            moments = self.module.apply({"params": params}, images)[0]
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def encode(self, params: Params, images: Array, keys: Key | None = None) -> Array:
        """Latents [B,h,w,c] float32: scaling_factor times a draw from the posterior by `keys` [B], or times its mean without them."""
        mean, logvar = self.posterior(params, images)
        if keys is not None:
            mean = mean + jnp.exp(0.5 * logvar) * jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)
        return self.spec["scaling_factor"] * mean

    def decode(self, params: Params, latents: Array) -> Array:
        """Images [B,H,W,C] float32, about [-1, 1], of scaled latents [B,h,w,c]."""
        with memory.gathering(self.gather):
            images = self.module.apply({"params": params}, None, latents.astype(jnp.float32) / self.spec["scaling_factor"])[1]
        return images.astype(jnp.float32)


def build(spec: Mapping[str, Any], *, dtype: str = "float32", remat: str = "none") -> Autoencoder:
    """The autoencoder that `spec` describes.

    Args:
      dtype: what it computes in; parameters, input and output are float32.
      remat: what its blocks keep for the backward pass, of `memory.POLICIES`.
    Raises: ValueError naming the key, what came and what is allowed.
    """
    fields = {f.name: f.default for f in dataclasses.fields(vae.AutoencoderKL) if f.name not in _MODULE_ONLY}
    known = {"model_type": MODEL_TYPE, "scaling_factor": 0.18215, **fields}
    spec = {key: tuple(value) if isinstance(value, list) else value for key, value in spec.items()}
    unknown = sorted(spec.keys() - known.keys())
    if unknown:
        raise ValueError(f"autoencoder.{unknown[0]}: unknown, allowed: {', '.join(sorted(known))}")
    spec = {**known, **spec}
    if spec["model_type"] != MODEL_TYPE:
        raise ValueError(f"autoencoder.model_type: got {spec['model_type']!r}, allowed: {MODEL_TYPE}")
    for key, got, allowed in (("dtype", dtype, _DTYPES), ("remat", remat, memory.POLICIES)):
        if got not in allowed:
            raise ValueError(f"{key}: got {got!r}, allowed: {', '.join(allowed)}")
    vae.check(spec)
    return Autoencoder(spec, vae.AutoencoderKL(dtype=jnp.dtype(dtype), remat=remat, **{key: spec[key] for key in fields}))
