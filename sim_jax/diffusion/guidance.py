"""Guidance: a denoiser pushed away from a worse one, D = D_guide + w (D_main - D_guide).

  classifier-free  the guide is the same network without conditions Ho & Salimans (arXiv 2207.12598)
  autoguidance     the guide is a smaller or less trained network   Karras et al. (arXiv 2406.02507)
  interval         w = 1 unless sigma_lo < sigma <= sigma_hi        Kynkaanniemi et al. (arXiv 2404.07724)

w = 1 is the main denoiser; w > 1 guides. The classifier-free paper writes 1 + w for our w.
"""

from __future__ import annotations

import math

import jax.numpy as jnp

from sim_jax.types import Array, Cond, DenoiseFn


def classifier_free(
    denoise: DenoiseFn, *, w: float, interval: tuple[float, float] | None = None, null_text: Array | None = None
) -> DenoiseFn:
    """Guides `denoise` by itself at null labels (all zeros) and the null caption; two network calls for each one.

    Args:
      denoise: the class- or text-conditional denoiser.
      w: guidance weight; at w = 1 `denoise` itself comes back.
      interval: (sigma_lo, sigma_hi) outside which w = 1; None guides everywhere.
      null_text: [1,L,D], the null caption, such as a text encoder's states of the empty prompt, all of its tokens valid; None is the
        network's own, which keeps the mask of the caption that it replaces.

    Raises:
      ValueError: w not finite, an empty interval, or a call with neither class labels nor text.
    """

    def unconditional(x: Array, sigma: Array, cond: Cond) -> Array:
        if cond.class_labels is None and cond.text is None:
            raise ValueError("cond.class_labels: got None, allowed: [B, label_dim], or text, where guidance is not 1")
        if cond.class_labels is not None:
            cond = cond._replace(class_labels=jnp.zeros_like(cond.class_labels))
        if null_text is not None:
            cond = cond._replace(text=jnp.broadcast_to(null_text, (x.shape[0], *null_text.shape[1:])), text_mask=None)
        return denoise(x, sigma, cond._replace(text=None) if null_text is None else cond)

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
