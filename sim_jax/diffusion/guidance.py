"""Guidance: a denoiser pushed away from a worse one, D = D_guide + w (D_main - D_guide).

  classifier-free  the guide is the same network without labels     Ho & Salimans (arXiv 2207.12598)
  autoguidance     the guide is a smaller or less trained network   Karras et al. (arXiv 2406.02507)
  interval         w = 1 unless sigma_lo < sigma <= sigma_hi        Kynkaanniemi et al. (arXiv 2404.07724)

w = 1 is the main denoiser; w > 1 guides. The classifier-free paper writes 1 + w for our w.
"""

from __future__ import annotations

import math

import jax.numpy as jnp

from sim_jax.types import Array, Cond, DenoiseFn


def classifier_free(
    denoise: DenoiseFn, *, w: float, interval: tuple[float, float] | None = None
) -> DenoiseFn:
    """Guides `denoise` by itself at null labels (all zeros); two network calls for each one.

    Args:
      denoise: the class-conditional denoiser.
      w: guidance weight; at w = 1 `denoise` itself comes back.
      interval: (sigma_lo, sigma_hi) outside which w = 1; None guides everywhere.

    Raises:
      ValueError: w not finite, an empty interval, or a call without class labels.
    """

    def unconditional(x: Array, sigma: Array, cond: Cond) -> Array:
        if cond.class_labels is None:
            raise ValueError("cond.class_labels: got None, allowed: [B, label_dim] where guidance is not 1")
        return denoise(x, sigma, cond._replace(class_labels=jnp.zeros_like(cond.class_labels)))

    return autoguidance(denoise, unconditional, w=w, interval=interval)


def autoguidance(
    denoise: DenoiseFn, guide: DenoiseFn, *, w: float, interval: tuple[float, float] | None = None
) -> DenoiseFn:
    """Guides `denoise` by a worse denoiser `guide` of the same inputs; arguments as in `classifier_free`."""
    if not math.isfinite(w):
        raise ValueError(f"guidance weight w: got {w}, allowed: a finite number")
    if interval is not None and not 0 <= interval[0] < interval[1]:
        raise ValueError(f"guidance interval: got {interval}, allowed: 0 <= sigma_lo < sigma_hi")
    if w == 1:
        return denoise

    def guided(x: Array, sigma: Array, cond: Cond) -> Array:
        main, other = denoise(x, sigma, cond), guide(x, sigma, cond)
        out = other + w * (main - other)
        if interval is None:
            return out
        inside = (interval[0] < sigma) & (sigma <= interval[1])
        return jnp.where(inside.reshape(inside.shape + (1,) * (x.ndim - 1)), out, main)

    return guided
