"""Score identity Distillation: https://arxiv.org/abs/2404.04057 (Zhou, Zheng, Wang, Yin, Huang; ICML 2024).

With x_g = G_theta(z), x_t = a_t x_g + sigma_t noise, the teacher's x0-prediction f_phi (D_real) and the
online one f_psi (D_fake), the generator's loss is that of the projected score less alpha times the squared
difference of the scores:

    L(theta) = E omega(t) { (f_phi - f_psi)^T (f_phi - x_g) - alpha || f_phi - f_psi ||^2 }(x_t)
             = E omega(t) { (1 - alpha) || f_phi - f_psi ||^2 + (f_phi - f_psi)^T (f_psi - x_g) }(x_t)

Either term of the first line estimates E || f_phi - f_psi ||^2 where f_psi is exact and errs where it is
not, each in its way, which the difference with alpha > 1 makes use of [the paper's argument, recalled].
Gradients flow through x_t into *both* networks and directly through x_g; the normaliser omega is detached.
The value of L says nothing: for an exact f_psi it is (1 - alpha) E || f_phi - f_psi ||^2, zero at alpha = 1
and below it at 1.2. What falls is the metric `divergence`.

Which divergence. Let F(pi, p) = int E_{x_t ~ pi_t} || f_phi - f_p ||^2 be the Fisher divergence (in x0-space,
of weight 1) with the sampling measure pi apart from the generator's distribution p. For an exact f_psi and
omega = 1 [derived; checked by the tests]:

    2 grad L = grad_p F + 2 (1 - alpha) grad_pi F        at pi = p = p_theta

so alpha = 1 is SIM's theorem with d = ||.||^2 (up to that factor 2; see `sim.py`), which holds the measure
fixed; alpha = 1/2 is the Fisher divergence differentiated in full; and at the default the measure moves the
other way, towards where the scores differ more.

Provenance: the loss, alpha = 1.2 and the normaliser [repo: mingyuanzhou/SiD, training/sid_loss.py,
run_sid.sh]. That code multiplies the loss by 100 before Adam; here the same is Adam's eps divided by 100.
"""

from __future__ import annotations

import math

import jax.numpy as jnp

from sim_jax.objectives import dsm, weights
from sim_jax.objectives.base import Nets, Objective, Published, check_number, denoise, diffuse, prediction_metrics, sum_chw
from sim_jax.types import Array, Cond, NoiseLevel


def pair_loss(
    nets: Nets,
    x0: Array,
    noise: Array,
    level: NoiseLevel,
    cond: Cond | None,
    *,
    alpha: float = 1.2,
    weighting: str = "sid",
    sigma_power: float | None = None,
) -> tuple[Array, dict[str, Array]]:
    """The generator's loss, differentiable in x0 = G(z).

    Args:
      nets: `teacher` (D_real) and `fake` (D_fake), their parameters constant. x0, noise: [B,H,W,C]. level:
      of x_t, entries [B]. cond: passed to both networks. alpha: share of the squared difference that is
      taken off. weighting: omega(t), a row of `weights.GENERATOR`; sigma_power is the knob of "paper".

    Returns:
      loss [B], summed over the sample's elements; metrics [B]: `weight` omega, `divergence` omega ||D_real -
      D_fake||^2 and those of `base.prediction_metrics`.

    Raises:
      ValueError: alpha not a finite number, unknown weighting or a knob that it does not have.
    """
    check_number("alpha", alpha, "a finite number", math.isfinite)
    weight = weights.get(weighting, sigma_power=sigma_power)

    x_t = diffuse(x0, noise, level)
    fake = denoise(nets.fake, x_t, level, cond)
    real = denoise(nets.teacher, x_t, level, cond)
    w = weight(level, x0, real)
    loss = w * sum_chw((real - fake) * ((real - x0) - alpha * (real - fake)))
    divergence = w * sum_chw(jnp.square(real - fake))
    return loss, {"weight": w, "divergence": divergence, **prediction_metrics(fake, real, x0)}


OBJECTIVE = Objective(
    name="sid",
    pair_loss=pair_loss,
    critic_loss=dsm.pair_loss,
    critic_steps=1,
    needs=frozenset({"teacher", "fake"}),
    published={
        "alpha": Published(1.2, "repo", "1.0 for AFHQv2 64x64"),
        "critic_steps": Published(1, "repo", "fake score first, fresh z in each of the two updates"),
        "init_sigma": Published(2.5, "repo", "G(z) = D(2.5 z; 2.5)"),
        "learning_rate": Published(1e-5, "repo", "CIFAR-10; 4e-6 for ImageNet 64x64"),
        "adam_betas": Published((0.0, 0.999), "repo"),
        "adam_eps": Published(1e-8, "repo", "float32; 1e-6 in float16; of a generator's loss times 100"),
        "batch": Published(256, "repo", "CIFAR-10; 8192 for ImageNet 64x64"),
        "karras_u": Published((0.0, 0.8), "repo", "generator's levels: sigma in [0.002, 24.4]"),
    },
)
