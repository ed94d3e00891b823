"""Named f-divergences, and the density ratio that weighs their gradients.

    D_f(q || p) = E_p f(r),   r = q / p = p_teacher / p_generator,   f convex with f(1) = 0,   h(r) = f''(r) r^2

Both gradients of the family that this package has are weighed by h alone (`f_distill`: its value; `uni`: its
value and derivative), so a divergence is one function here.

    rkl              f = - log r                               h = 1          KL(p || q), Diff-Instruct's and DMD's
    kl, fkl          f = r log r                               h = r          KL(q || p)
    jf, jeffreys     f = (r - 1) log r                         h = 1 + r      their sum
    js               f = r log r - (1 + r) log((1 + r) / 2)    h = r / (1 + r)    Jensen-Shannon, doubled
    sf               f = (1 + r) log((1 + r) / (2 r))          h = 1 / (1 + r)    "softened" reverse KL
    neyman           f = (1 - r)^2 / (2 r)                     h = 1 / r
    sh               f = 2 (1 - sqrt(r))^2                     h = sqrt(r)    squared Hellinger
    chi2             f = (r - 1)^2                             h = 2 r^2      Pearson

Names: f-distill's, https://arxiv.org/abs/2502.15681, and Uni-Instruct's, https://arxiv.org/abs/2505.20755. h of
the former [repo: NVlabs/FastGen, fastgen/methods/distribution_matching/f_distill.py], constants dropped; f is
scaled to it [derived; checked by the tests].
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sim_jax.objectives.base import Nets, check_number, logits
from sim_jax.types import Array, Cond, NoiseLevel

TABLE: dict[str, Callable[[Array], Array]] = {
    "rkl": jnp.ones_like,
    "kl": lambda r: r,
    "fkl": lambda r: r,
    "jf": lambda r: 1.0 + r,
    "jeffreys": lambda r: 1.0 + r,
    "js": lambda r: r / (1.0 + r),
    "sf": lambda r: 1.0 / (1.0 + r),
    "neyman": lambda r: 1.0 / r,
    "sh": jnp.sqrt,
    "chi2": lambda r: 2.0 * jnp.square(r),
}


def log_ratio(
    nets: Nets, x_t: Array, level: NoiseLevel, cond: Cond | None, *, lower: float, upper: float
) -> Array:
    """log r(x_t), [B]: the mean of the discriminator's logits, clipped to [log lower, log upper]; a constant.

    Raises:
      ValueError: not 0 < lower < upper < inf.
    """
    check_number("ratio_lower", lower, "0 < ratio_lower < ratio_upper", lambda v: v > 0)
    check_number("ratio_upper", upper, "ratio_lower < ratio_upper < inf", lambda v: lower < v < math.inf)
    scores = jnp.mean(logits(nets.discriminate, x_t, level, cond), axis=1)
    return jax.lax.stop_gradient(jnp.clip(scores, math.log(lower), math.log(upper)))
