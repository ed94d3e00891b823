"""Regression of the generator on given images, a separate piece that any method can take.

    L(theta) = E d( G_theta(z), sg[y] )

with y what the teacher's ODE makes of the same z (DMD, https://arxiv.org/abs/2311.18828), or any other pair.
d over the N = CHW elements of a sample, reduction "mean" dividing by N:

    squared_l2, pseudo_huber, ...   a row of `distances.py`, of x0 - y
    features                        a perceptual distance in the maps f_l of some network: the mean over l of
                                    mean_HW sum_C ( f_l(x0) / |f_l(x0)| - f_l(y) / |f_l(y)| )^2

|.| is the norm over the channels. "features" is LPIPS, https://arxiv.org/abs/1801.03924, without its learned
weights of the channels and with the mean over maps where LPIPS has the sum; any network's own features serve,
the teacher's for one. It is per element already: `reduction` does not touch it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from sim_jax.objectives import distances
from sim_jax.objectives.base import REDUCTIONS, look_up, mean_chw, unknown
from sim_jax.types import Array

# images [B,H,W,C] -> maps, each [B,r,r,channels]
FeaturesFn = Callable[[Array], Sequence[Array]]
PERCEPTUAL = "features"


def regression_loss(
    x0: Array,
    target: Array,
    *,
    distance: str = "squared_l2",
    features: FeaturesFn | None = None,
    reduction: str = "mean",
    c: float | None = None,
    p: float | None = None,
    eps: float | None = None,
) -> tuple[Array, dict[str, Array]]:
    """d(x0, target), differentiable in x0 = G(z); the target is a constant.

    Args:
      x0, target: [B,H,W,C]. distance: a row of `distances.TABLE`, or "features"; c, p and eps are the knobs of the
      first kind (`None`: its default). features: the maps of "features", its parameters constant. reduction: "mean"
      or "sum" over CHW.

    Returns:
      loss [B]; metrics [B]: `regression_error`, mean_CHW (x0 - target)^2.

    Raises:
      ValueError: unknown distance or reduction, a knob that the distance does not have or out of range, or
      "features" without any.
    """
    check(distance=distance, reduction=reduction, c=c, p=p, eps=eps)
    target = jax.lax.stop_gradient(target)
    metrics = {"regression_error": mean_chw(jnp.square(x0 - target))}
    if distance == PERCEPTUAL:
        if features is None:
            raise ValueError("features: got None, allowed with distance 'features': a function of the images")
        maps = zip(features(x0), features(target), strict=True)
        return jnp.mean(jnp.stack([_map_distance(a, b) for a, b in maps]), axis=0), metrics
    elements = x0[0].size if reduction == "mean" else 1
    return distances.get(distance, c=c, p=p, eps=eps).value(x0 - target) / elements, metrics


def check(*, distance: str, reduction: str = "mean", **knobs: float | None) -> None:
    """Refuses what `regression_loss` refuses, before there are images.

    Raises:
      ValueError: unknown distance or reduction, or a knob that the distance does not have or out of range.
    """
    look_up("reduction", REDUCTIONS, reduction)
    if distance not in (*distances.TABLE, PERCEPTUAL):
        raise unknown("distance", distance, (*distances.TABLE, PERCEPTUAL))
    if distance != PERCEPTUAL:
        distances.get(distance, **knobs)
    elif any(value is not None for value in knobs.values()):
        raise unknown(f"knob of distance {PERCEPTUAL!r}", next(k for k, v in knobs.items() if v is not None), ())


def _map_distance(a: Array, b: Array) -> Array:
    """The squared difference of the channel-normalised maps, its mean over the positions: [B]."""
    def unit(x: Array) -> Array:
        return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-10)

    return jnp.mean(jnp.sum(jnp.square(unit(a) - unit(b)), axis=-1), axis=(1, 2))
