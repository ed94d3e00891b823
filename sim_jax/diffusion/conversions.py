"""What a network may predict, and how to get from one prediction to another, as one table.

With x_t = alpha x_0 + sigma eps, a network's prediction of one of these gives the others:
  x0      the clean image
  eps     (x_t - alpha x0) / sigma                                   Ho et al. (arXiv 2006.11239)
  score   (alpha x0 - x_t) / sigma^2 = -eps / sigma                  Tweedie; grad_{x_t} log p_t(x_t)
  v       alpha eps - sigma x0 = (alpha x_t - (alpha^2 + sigma^2) x0) / sigma
          for any alpha and sigma; Salimans & Ho (arXiv 2202.00512) have alpha^2 + sigma^2 = 1

At sigma -> 0 every one still gives x0 = x_t / alpha, but x0 no longer gives eps, score or v: the
difference from x_t that they divide by sigma is lost (0/0 gives NaN at sigma = 0, and float32 rounding of
about 1e-7 |x_t| / sigma in eps before that). At alpha -> 0, eps and score lose x0 in the same way; v and
x0 do not. Nothing is clamped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from sim_jax.types import Array, NoiseLevel


class Parameterisation(NamedTuple):
    """Both functions take (value or x0, x_t, alpha, sigma), broadcastable to one another."""

    to_x0: Callable[[Array, Array, Array, Array], Array]
    from_x0: Callable[[Array, Array, Array, Array], Array]


TABLE = {
    "x0": Parameterisation(lambda x0, x, a, s: x0,
                           lambda x0, x, a, s: x0),
    "eps": Parameterisation(lambda eps, x, a, s: (x - s * eps) / a,
                            lambda x0, x, a, s: (x - a * x0) / s),
    "score": Parameterisation(lambda score, x, a, s: (x + s**2 * score) / a,
                              lambda x0, x, a, s: (a * x0 - x) / s**2),
    "v": Parameterisation(lambda v, x, a, s: (a * x - s * v) / (a**2 + s**2),
                          lambda x0, x, a, s: (a * x - (a**2 + s**2) * x0) / s),
}


def convert(value: Array, x_t: Array, level: NoiseLevel, *, source: str, target: str) -> Array:
    """Turns a prediction of `source` at x_t into the prediction of `target`.

    Args:
      value: [B, ...] the prediction, of x_t's shape.
      x_t: [B, ...] the noisy image, alpha x_0 + sigma n (not rescaled).
      level: its noise level, entries [B].
      source, target: one of "x0", "eps", "score", "v".

    Raises:
      ValueError: an unknown source or target.
    """
    for key, name in (("source", source), ("target", target)):
        if name not in TABLE:
            raise ValueError(f"{key}: got {name!r}, allowed: {', '.join(TABLE)}")
    if source == target:
        return value
    alpha, sigma = (a.reshape(a.shape + (1,) * (x_t.ndim - a.ndim)) for a in (level.alpha, level.sigma))
    return TABLE[target].from_x0(TABLE[source].to_x0(value, x_t, alpha, sigma), x_t, alpha, sigma)
