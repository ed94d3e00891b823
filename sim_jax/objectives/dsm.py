"""Denoising score matching: trains a denoiser, a teacher on data or the fake score on generated samples.

    L(psi) = E_{x0, t, noise} lambda(s) || D_psi(x_t) - sg[x0] ||^2
    x_t = alpha x0 + sigma noise,  s = sigma / alpha

whose minimiser is D(x_t) = E[x0 | x_t], that is the score of the noised distribution (Tweedie). EDM,
https://arxiv.org/abs/2206.00364, Eq. 2 and Table 1 ("loss weighting" lambda); the fake-score loss of SiD,
Diff-Instruct and Uni-Instruct [repo], and of SIM [recalled].

The reduction is the sum over the sample's elements by default, as in EDM's and SiD's code (`loss.sum() /
batch`), so their learning rates and gradient scales carry over; "mean" is DMD2's. x0 is a constant here by
definition: its gradient is stopped, so a generator's output may be passed as it is.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sim_jax.objectives import weights
from sim_jax.objectives.base import REDUCTIONS, Nets, Objective, Published, denoise, diffuse, look_up, mean_chw
from sim_jax.types import Array, Cond, NoiseLevel


def pair_loss(
    nets: Nets,
    x0: Array,
    noise: Array,
    level: NoiseLevel,
    cond: Cond | None,
    *,
    sigma_data: float = 0.5,
    weighting: str = "edm",
    reduction: str = "sum",
) -> tuple[Array, dict[str, Array]]:
    """Weighted squared error of `nets.fake`, the network that is trained.

    Args:
      nets: `fake` only.
      x0, noise: [B,H,W,C].
      level: of x_t, entries [B].
      cond: passed to the network.
      sigma_data: standard deviation of the data, EDM's constant (0.5 for images in [-1, 1]).
      weighting: a row of `weights.DENOISING`.
      reduction: "sum" or "mean" over the sample's elements.

    Returns:
      loss [B]; metrics: `denoising_error`, the mean squared error per element [B].

    Raises:
      ValueError: unknown weighting or reduction, or sigma_data not positive.
    """
    weight = weights.get_denoising(weighting, sigma_data=sigma_data)
    reduce = look_up("reduction", REDUCTIONS, reduction)
    x0 = jax.lax.stop_gradient(x0)
    denoised = denoise(nets.fake, diffuse(x0, noise, level), level, cond)
    squared = jnp.square(denoised - x0)
    loss = weight(level.sigma / level.alpha) * reduce(squared)
    return loss, {"denoising_error": mean_chw(squared)}


OBJECTIVE = Objective(
    name="dsm",
    pair_loss=pair_loss,
    critic_loss=None,
    critic_steps=0,
    needs=frozenset({"fake", "data"}),
    published={
        "sigma_data": Published(0.5, "repo", "EDM"),
        "P_mean": Published(-1.2, "repo", "EDM: ln sigma ~ N(P_mean, P_std^2)"),
        "P_std": Published(1.2, "repo", "EDM"),
    },
)
