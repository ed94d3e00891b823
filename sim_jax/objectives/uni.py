"""Uni-Instruct: https://arxiv.org/abs/2505.20755 (Wang, Bai, Zhang, Zhang, Luo, Sun; NeurIPS 2025).

An f-divergence expands along the diffusion, its derivative by sigma^2 being - 1/2 E_{p_t} [ phi(r) ||y||^2 ] at alpha = 1.
What is minimised is that integral, with any w(t):

    D_f(q || p) = int w(t) E_{x_t ~ p_theta,t} [ phi(r) ||y||^2 ] dt
    r = q_t / p_t,   phi(r) = r^2 f''(r)  (h in `f_divergences.py`),   y = s_p - s_q = - grad log r

Its gradient. Under p -> p + dp: dr = - r dp / p and dy = grad(dp / p), hence

    d(.) = int dp [ phi(r) - r phi'(r) ] ||y||^2  +  E_p [ 2 phi(r) y^T d s_p ]

The first integral is a change of the sampling measure, that is the gradient, through x_t, of its bracket's mean; the
second is SIM's theorem (`sim.py`) with d' = 2 phi(r) y. So, b = s_p - grad log q_t(x_t | x0),

    L(theta) = E w(t) { [ phi(r) - r phi'(r) ] ||y||^2  -  2 phi(r) y^T b }(x_t)

with everything differentiable in x_t: y and b through both networks, r through its known gradient - r y, as
log r = sg[logit] + sg[-y]^T (x_t - sg[x_t]), of which a discriminator supplies the value only. In the paper's
terms the gradient of the second summand is Grad(SIM), weighed by phi; of the first, grad r gives r^2 phi''(r) ||y||^2 y,
the form of Diff-Instruct's gradient, Grad(DI), and grad ||y||^2 a term that the authors' code names FGM.

    rkl    phi = 1      the Fisher divergence in full: twice `sid` at alpha = 1/2
    fkl    phi = r      the first bracket is zero: SIM weighed by r, and by grad r
    chi2   phi = 2 r^2

In x0-space: y = k Delta, b = k (D_fake - x0), Delta = D_fake - D_real, k = alpha / sigma^2, and L / k^2 is taken. L's
value says nothing; `divergence`, w phi(r) ||Delta||^2, falls.

Provenance: derivation [derived; checked by the tests]. The authors' training loop [repo: a-little-hoof/Uni_Instruct,
fsim_training] has the same coefficients for chi2 (2 r^2 SIM + 4 r^2 DI - 2 r^2 FGM, the last commented out) and js; for
fkl r SIM, for rkl SIM alone, without the first summand. It detaches r (ratio_gradient "none" here), takes ||.|| over
the whole batch and r from a loss instead of a logit: none of the three is followed. It normalises as SiD does.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sim_jax.objectives import dsm, f_divergences, sid, weights
from sim_jax.objectives.base import Nets, Objective, Published, denoise, diffuse, expand, look_up, prediction_metrics, score_scale, sum_chw
from sim_jax.types import Array, Cond, NoiseLevel

RATIO_GRADIENTS = {"analytic": True, "none": False}


def pair_loss(
    nets: Nets,
    x0: Array,
    noise: Array,
    level: NoiseLevel,
    cond: Cond | None,
    *,
    divergence: str = "fkl",
    ratio_lower: float = 0.1,
    ratio_upper: float = 20.0,
    ratio_gradient: str = "analytic",
    weighting: str = "sid",
    sigma_power: float | None = None,
) -> tuple[Array, dict[str, Array]]:
    """The generator's loss, differentiable in x0 = G(z); its gradient is that of the expanded divergence.

    Args:
      nets: `teacher` (D_real) and `fake` (D_fake), their parameters constant; `discriminate`, evaluated only. x0,
      noise: [B,H,W,C]. level: of x_t, entries [B]. cond: passed to all. divergence: a row of `f_divergences.TABLE`.
      ratio_lower, ratio_upper: what r is clipped to. ratio_gradient: "analytic", or "none" to hold r constant, which
      is exact for "rkl" only. weighting: w, a row of `weights.GENERATOR`; sigma_power is the knob of "paper".

    Returns:
      loss [B], summed over the sample's elements; metrics [B]: `density_ratio` r, `divergence` and those of
      `base.prediction_metrics`.

    Raises:
      ValueError: an unknown name, or a knob out of range.
    """
    phi = look_up("divergence", f_divergences.TABLE, divergence)
    weight = weights.get(weighting, sigma_power=sigma_power)
    follow = look_up("ratio_gradient", RATIO_GRADIENTS, ratio_gradient)

    x_t = diffuse(x0, noise, level)
    fake = denoise(nets.fake, x_t, level, cond)
    real = denoise(nets.teacher, x_t, level, cond)
    delta = fake - real
    log_r = f_divergences.log_ratio(nets, x_t, level, cond, lower=ratio_lower, upper=ratio_upper)
    if follow:
        descent = jax.lax.stop_gradient(-expand(score_scale(level), x_t) * delta)
        log_r = log_r + sum_chw(descent * (x_t - jax.lax.stop_gradient(x_t)))
    r = jnp.exp(log_r)
    value, slope = jax.jvp(phi, (r,), (r,))
    w, squared = weight(level, x0, real), sum_chw(jnp.square(delta))
    loss = w * ((value - slope) * squared - 2.0 * value * sum_chw(delta * (fake - x0)))
    return loss, {"density_ratio": r, "divergence": w * value * squared, **prediction_metrics(fake, real, x0)}


OBJECTIVE = Objective(
    name="uni",
    pair_loss=pair_loss,
    critic_loss=dsm.pair_loss,
    critic_steps=1,
    needs=frozenset({"teacher", "fake", "discriminator", "data"}),
    published={
        **{name: sid.OBJECTIVE.published[name] for name in (
            "critic_steps", "init_sigma", "learning_rate", "adam_betas", "batch", "karras_u")},
        "divergence": Published("fkl", "paper", "ImageNet 64x64, FID 1.02; also rkl, jeffreys (the code: 0.4 fkl + 0.6 rkl), chi2"),
        "adversarial_weight": Published(1e-4, "repo", "lsg_gan / lsg, as in `sida.py`, times CHW; added to the loss"),
        "adversarial_starts": Published(200_000, "repo", "images; SIM with SiD's weighting before"),
        "ratio_clip": Published((0.1, 20.0), "ours", "f-distill's"),
    },
)
