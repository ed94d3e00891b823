"""SiDA, Adversarial Score identity Distillation: https://arxiv.org/abs/2410.14919 (Zhou et al.; ICLR 2025).

    L(theta) = 1/2 [ L_SiD(theta) + E omega(t) lambda CHW softplus( -l(x_t) ) ]

SiD's loss at alpha = 1 (`sid.py`) and the adversarial one (`adversarial.py`) at the same x_t, both weighed by
SiD's normaliser omega, so that lambda has one meaning at every noise level. The logits l are those of the fake
score's own encoder (the mean of its channels, a map), clamped to +-10; `nets.discriminate` may be any other.
SiD2A is SiDA started from a generator that SiD has trained.

Two differences to the code. It multiplies SiD by 100 and the adversarial term by 0.01: lambda = 1e-4 is the
quotient [derived], the common factor is Adam's eps over 100, as in `sid.py`. And it averages softplus over a
device's samples *before* it divides by each sample's normaliser, so that its sample meets the mean omega; here, its
own. In its critic, denoising score matching is summed over CHW and the discriminator's loss has the weight
edm(sigma) / 2, real and fake images sharing the level and the noise.

Provenance: [repo: mingyuanzhou/SiD, branch sida, sida_training/sida_loss.py, sida_training_loop.py, run_sida.sh].
"""

from __future__ import annotations

import math

from sim_jax.objectives import adversarial, dsm, sid
from sim_jax.objectives.base import Nets, Objective, Published, check_number
from sim_jax.types import Array, Cond, NoiseLevel


def pair_loss(
    nets: Nets,
    x0: Array,
    noise: Array,
    level: NoiseLevel,
    cond: Cond | None,
    *,
    alpha: float = 1.0,
    weighting: str = "sid",
    sigma_power: float | None = None,
    adversarial_weight: float = 1e-4,
    clamp: float | None = 10.0,
) -> tuple[Array, dict[str, Array]]:
    """The generator's loss, differentiable in x0 = G(z).

    Args:
      nets: `teacher`, `fake` and `discriminate`, their parameters constant. x0, noise, level, cond, alpha, weighting,
      sigma_power: as in `sid.pair_loss`. adversarial_weight: lambda. clamp: of the logits, `None` for none.

    Returns:
      loss [B], summed over the sample's elements; metrics [B]: those of `sid.pair_loss` and of
      `adversarial.generator_loss`.

    Raises:
      ValueError: a knob out of range, or one that the weighting does not have.
    """
    check_number("adversarial_weight", adversarial_weight, "0 <= adversarial_weight < inf", lambda v: 0 <= v < math.inf)
    by_scores, metrics = sid.pair_loss(nets, x0, noise, level, cond, alpha=alpha, weighting=weighting, sigma_power=sigma_power)
    by_logits, logit_metrics = adversarial.generator_loss(nets.discriminate, x0, noise, level, cond, clamp=clamp)
    by_logits = metrics["weight"] * adversarial_weight * x0[0].size * by_logits
    return 0.5 * (by_scores + by_logits), {**metrics, **logit_metrics}


OBJECTIVE = Objective(
    name="sida",
    pair_loss=pair_loss,
    critic_loss=dsm.pair_loss,
    critic_steps=1,
    needs=frozenset({"teacher", "fake", "discriminator", "data"}),
    published={
        **{name: sid.OBJECTIVE.published[name] for name in (
            "critic_steps", "init_sigma", "learning_rate", "adam_betas", "adam_eps", "batch", "karras_u")},
        "alpha": Published(1.0, "repo"),
        "adversarial_weight": Published(1e-4, "derived", "lsg_gan / lsg = 0.01 / 100"),
        "clamp": Published(10.0, "repo", "of the generator's logits only"),
        "discriminator_weight": Published(0.5, "repo", "times edm(sigma), where dsm is summed over CHW; 50 for EDM2"),
        "clip_value": Published(1.0, "repo", "of each entry of the fake score's gradient"),
        "generator_starts": Published(100_000, "repo", "images before the generator moves"),
        "adversarial_starts": Published(200_000, "repo", "images before it sees the adversarial term; SiD without 1/2 till then"),
    },
)
