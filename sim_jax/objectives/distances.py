"""Scalar distances d(y) of the score-divergence gradient theorem, each with its gradient d'(y) written out.

Source: Score Implicit Matching, https://arxiv.org/abs/2410.16794, Theorem 3.1: any differentiable d: R^D ->
R+ with d(0) = 0. ||.|| is the Euclidean norm over *all* elements of one sample.

    pseudo_huber(c)   d = sqrt(||y||^2 + c^2) - c                   d' = y / sqrt(||y||^2 + c^2)
    squared_l2        d = ||y||^2                                   d' = 2 y
    power(p, eps)     d = (||y||^2 + eps^2)^(p/2) - eps^p           d' = p (||y||^2 + eps^2)^(p/2 - 1) y
    l2(eps)           power with p = 1 (the same function as pseudo_huber with c = eps)

Why `power` is smoothed. The loss differentiates d' once more, and ||y||^p has no second derivative at y = 0
for p < 2 (and an autodiff 0 * inf for 2 < p < 4). y = 0 does occur: teacher and fake score start as the
same network. The smoothed d is a distance in its own right, so the theorem holds for it exactly, whatever
eps; p = 2 gives squared_l2 exactly.

In which space y, c and eps live is the caller's choice, see `sim.py`. Provenance: the form of pseudo_huber
is the paper's; its c was not found in any text at hand. The default 0.03 is iCT's convention c = 0.00054
sqrt(D) at D = 3 * 32 * 32, https://arxiv.org/abs/2310.14189 [recalled], which lives in x0-space: scale it
by sqrt(D) and treat it as a knob to sweep. Powers other than 2 follow from the theorem [derived]; eps is
ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from sim_jax.objectives.base import check_knobs, check_number, expand, knobs_of, look_up, sum_chw
from sim_jax.types import Array


class Distance(NamedTuple):
    """d and d', y [B,H,W,C] -> [B] and -> [B,H,W,C]."""

    value: Callable[[Array], Array]
    gradient: Callable[[Array], Array]


def pseudo_huber(*, c: float = 0.03) -> Distance:
    """sqrt(||y||^2 + c^2) - c: quadratic below c, linear above; |d'| < 1. c in the units of y."""
    check_number("c", c, "0 < c < inf", lambda v: 0 < v < math.inf)

    def root(y: Array) -> Array:
        return jnp.sqrt(sum_chw(jnp.square(y)) + c**2)

    # ||y||^2 / (root + c) is root - c without its cancellation at small y
    return Distance(
        value=lambda y: sum_chw(jnp.square(y)) / (root(y) + c),
        gradient=lambda y: y / expand(root(y), y),
    )


def squared_l2() -> Distance:
    """||y||^2, the distance of SiD."""
    return Distance(value=lambda y: sum_chw(jnp.square(y)), gradient=lambda y: 2.0 * y)


def power(*, p: float = 1.5, eps: float = 1e-4) -> Distance:
    """(||y||^2 + eps^2)^(p/2) - eps^p, that is ||y||^p away from zero. eps in the units of y."""
    # beyond 4, score space leaves float32's range at sigma = 0.002
    check_number("p", p, "0 < p <= 4", lambda v: 0 < v <= 4)
    check_number("eps", eps, "0 < eps < inf", lambda v: 0 < v < math.inf)

    def smooth(y: Array, exponent: float) -> Array:
        return jnp.power(sum_chw(jnp.square(y)) + eps**2, exponent)

    return Distance(
        value=lambda y: smooth(y, p / 2) - eps**p,
        gradient=lambda y: p * expand(smooth(y, p / 2 - 1), y) * y,
    )


def l2(*, eps: float = 1e-4) -> Distance:
    """||y||, smoothed at zero."""
    return power(p=1.0, eps=eps)


TABLE: dict[str, Callable[..., Distance]] = {
    "pseudo_huber": pseudo_huber,
    "squared_l2": squared_l2,
    "power": power,
    "l2": l2,
}


def get(name: str, **knobs: float | None) -> Distance:
    """Looks up a distance; a knob that is `None` takes the distance's default.

    Raises:
      ValueError: unknown distance, a knob it does not have, or a knob out of range.
    """
    make = look_up("distance", TABLE, name)
    given = {key: value for key, value in knobs.items() if value is not None}
    check_knobs(f"distance {name!r}", given, knobs_of(make))
    return make(**given)
