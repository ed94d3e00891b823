"""Named weightings of the losses, in s = sigma / alpha, the noise level in variance-exploding form.

Of a generator's loss (`GENERATOR`), w [B] from (level, x0, D_real):

    none    w = 1
    paper   w = s^sigma_power. SIM's divergence has a weight w(t) and leaves it open,
            https://arxiv.org/abs/2410.16794; that it is a power of s is ours.
    sid     w = 1 / sg[ clip( mean_CHW |x0 - D_real|, 1e-5 ) ], per sample. SiD,
            https://arxiv.org/abs/2404.04057 [repo: mingyuanzhou/SiD, training/sid_loss.py]. It depends
            on the sample and its own gradient is stopped, so the loss is no longer the exact gradient of a
            divergence: a normaliser that works, not a theorem.
    dmd     w = 1 / sg[ mean_CHW |x0 - D_real| + normaliser_eps ], the same idea in DMD and DMD2,
            https://arxiv.org/abs/2405.14867 [repo: tianweiy/DMD2, main/edm/edm_guidance.py], the 1e-6
            FastGen's [repo: NVlabs/FastGen, fastgen/methods/common_loss.py]. DMD2's own code adds nothing and
            passes the quotient through nan_to_num, which makes 0 / 0 zero but x / 0 3e38; here, with
            normaliser_eps = 0, w is zero where the mean is.

Of denoising score matching (`DENOISING`), lambda(s) on the squared error of the x0-prediction:

    edm     (s^2 + sigma_data^2) / (s sigma_data)^2 = 1 / c_out(s)^2. EDM, https://arxiv.org/abs/2206.00364,
            Table 1; also SiD's and Diff-Instruct's fake score [repo].
    dmd2    1 / s^2 + 1 / sigma_data^2 [repo: tianweiy/DMD2, main/edm/edm_guidance.py]: the same function as
            edm, written as its source writes it (the two codes differ in the reduction, sum against mean).
    eps     1 / s^2: the squared error of the noise prediction, (x_t - alpha D) / sigma (DDPM's simple loss).
    none    1
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sim_jax.objectives.base import check_knobs, check_number, knobs_of, look_up, mean_chw
from sim_jax.types import Array, NoiseLevel

# (level, x0 [B,H,W,C], D_real [B,H,W,C]) -> w [B]
GeneratorWeight = Callable[[NoiseLevel, Array, Array], Array]


def none() -> GeneratorWeight:
    """w = 1."""
    return lambda level, x0, real: jnp.ones_like(level.sigma)


def paper(*, sigma_power: float = 0.0) -> GeneratorWeight:
    """w(t) = (sigma / alpha)^sigma_power."""
    check_number("sigma_power", sigma_power, "a finite number", math.isfinite)
    return lambda level, x0, real: jnp.power(level.sigma / level.alpha, sigma_power)


def sid() -> GeneratorWeight:
    """One over the detached mean absolute error of the teacher's prediction, per sample."""
    def weight(level: NoiseLevel, x0: Array, real: Array) -> Array:
        return 1.0 / jax.lax.stop_gradient(jnp.maximum(mean_chw(jnp.abs(x0 - real)), 1e-5))

    return weight


def dmd(*, normaliser_eps: float = 1e-6) -> GeneratorWeight:
    """One over the detached mean absolute error of the teacher's prediction plus normaliser_eps, per sample."""
    check_number("normaliser_eps", normaliser_eps, "0 <= normaliser_eps < inf", lambda v: 0 <= v < math.inf)

    def weight(level: NoiseLevel, x0: Array, real: Array) -> Array:
        error = jax.lax.stop_gradient(mean_chw(jnp.abs(x0 - real))) + normaliser_eps
        return jnp.where(error > 0, 1.0 / jnp.where(error > 0, error, 1.0), 0.0)

    return weight


GENERATOR: dict[str, Callable[..., GeneratorWeight]] = {"none": none, "paper": paper, "sid": sid, "dmd": dmd}

# (s [B], sigma_data) -> lambda [B]
DENOISING: dict[str, Callable[[Array, float], Array]] = {
    "edm": lambda s, sigma_data: (jnp.square(s) + sigma_data**2) / jnp.square(s * sigma_data),
    "dmd2": lambda s, sigma_data: 1.0 / jnp.square(s) + 1.0 / sigma_data**2,
    "eps": lambda s, sigma_data: 1.0 / jnp.square(s),
    "none": lambda s, sigma_data: jnp.ones_like(s),
}


def get(name: str, **knobs: float | None) -> GeneratorWeight:
    """Looks up the weighting of a generator's loss; a knob that is `None` takes the weighting's default.

    Raises:
      ValueError: unknown weighting, a knob it does not have, or a knob out of range.
    """
    make = look_up("weighting", GENERATOR, name)
    given = {key: value for key, value in knobs.items() if value is not None}
    check_knobs(f"weighting {name!r}", given, knobs_of(make))
    return make(**given)


def get_denoising(name: str, *, sigma_data: float) -> Callable[[Array], Array]:
    """Looks up lambda(s), [B] -> [B], of denoising score matching.

    Raises:
      ValueError: unknown weighting, or sigma_data not positive.
    """
    weight = look_up("weighting", DENOISING, name)
    check_number("sigma_data", sigma_data, "0 < sigma_data < inf", lambda v: 0 < v < math.inf)
    return lambda s: weight(s, sigma_data)
