"""Diff-Instruct: https://arxiv.org/abs/2305.18455 (Luo, Hu, Zhang, Sun, Li, Zhang; NeurIPS 2023).

The integral Kullback-Leibler divergence between the generator's distribution and the teacher's, both noised,

    D_IKL(p_theta, q) = int w(t) KL(p_theta,t || q_t) dt

has a gradient without the unknown d s_{p_theta,t} / d theta, whose expectation under p_theta,t is zero:

    grad D_IKL = int w(t) E_{x0 = G_theta(z), x_t ~ q_t(.|x0)} [ s_psi(x_t) - s_q(x_t) ]^T d x_t / d theta dt

the online network s_psi standing for s_{p_theta,t}. Nothing flows through the networks, neither into their
parameters nor into x_t: a generator's step costs two forward passes besides the generator's own.

With s_psi - s_q = (alpha / sigma^2) (D_fake - D_real), d x_t = alpha d x0, and w(t) = w' sigma^2 / alpha^2:

    L(theta) = E w' sg[ D_fake(x_t) - D_real(x_t) ]^T x0

so that weighting "none", w' = 1, is the published code's, and "paper" with sigma_power = -2 is the integral
of the plain KL. The value of L says nothing, its gradient does; what falls is `score_divergence`.

Provenance: theorem [recalled; checked by the tests], loss and settings [repo: pkulwj1994/diff_instruct,
training/di_loss.py, di_train.py, README]. That code evaluates both networks with dropout, of one random
state; here neither has any.
"""

from __future__ import annotations

import jax

from sim_jax.objectives import dsm, weights
from sim_jax.objectives.base import Nets, Objective, Published, denoise, diffuse, prediction_metrics, sum_chw
from sim_jax.types import Array, Cond, NoiseLevel


def pair_loss(
    nets: Nets,
    x0: Array,
    noise: Array,
    level: NoiseLevel,
    cond: Cond | None,
    *,
    weighting: str = "none",
    sigma_power: float | None = None,
) -> tuple[Array, dict[str, Array]]:
    """The generator's loss, linear in x0 = G(z); its gradient is that of the divergence.

    Args:
      nets: `teacher` (D_real) and `fake` (D_fake), evaluated only. x0, noise: [B,H,W,C]. level: of x_t,
      entries [B]. cond: passed to both networks. weighting: w', a row of `weights.GENERATOR`; sigma_power
      is the knob of "paper".

    Returns:
      loss [B], summed over the sample's elements; metrics [B]: those of `base.prediction_metrics`.

    Raises:
      ValueError: unknown weighting or a knob that it does not have.
    """
    weight = weights.get(weighting, sigma_power=sigma_power)
    x_t = jax.lax.stop_gradient(diffuse(x0, noise, level))
    fake = denoise(nets.fake, x_t, level, cond)
    real = denoise(nets.teacher, x_t, level, cond)
    gradient = jax.lax.stop_gradient(fake - real)
    return weight(level, x0, real) * sum_chw(gradient * x0), prediction_metrics(fake, real, x0)


OBJECTIVE = Objective(
    name="diff_instruct",
    pair_loss=pair_loss,
    critic_loss=dsm.pair_loss,
    critic_steps=1,
    needs=frozenset({"teacher", "fake"}),
    published={
        "critic_steps": Published(1, "repo", "fake score first, fresh z in each of the two updates"),
        "init_sigma": Published(1.0, "repo", "G(z) = D(z; 1)"),
        "learning_rate": Published(1e-5, "repo", "CIFAR-10, generator and fake score"),
        "adam_betas": Published((0.0, 0.999), "repo"),
        "batch": Published(128, "repo", "CIFAR-10"),
        "P_mean": Published(-1.2, "repo", "both losses' levels: ln sigma ~ N(P_mean, P_std^2)"),
        "P_std": Published(1.2, "repo"),
    },
)
