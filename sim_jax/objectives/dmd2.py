"""DMD2, Improved Distribution Matching Distillation: https://arxiv.org/abs/2405.14867 (Yin et al.; NeurIPS 2024).

The gradient of KL(p_theta,t || q_t) between the noised distributions of generator and teacher (as in
`diff_instruct.py`), each sample's divided by the error of the teacher's own prediction:

    g = sg[ ( D_fake(x_t) - D_real(x_t) ) / mean_CHW |x0 - D_real(x_t)| ]          weighting "dmd", see `weights.py`
    L(theta) = E 0.5 mean_CHW || x0 - sg[x0 - g] ||^2,   so that   dL / dx0 = g / CHW per sample

Both networks are evaluated only: nothing flows through them. The mean over CHW is the published reduction, and
a weight of the adversarial term carries over with this reduction only. L's value is 0.5 mean g^2; what falls is
`score_divergence`. Weighting "none" and reduction "sum" have Diff-Instruct's gradient, the integral KL's.

The rest of DMD2 is pieces that any method can take: the critic moves `critic_steps` times for each update of
the generator (two time scales), by `dsm` with DMD2's weighting and reduction; the adversarial term is
`adversarial.py`; a generator of several steps starts from its own intermediate states (backward simulation).

Provenance: loss and settings [repo: tianweiy/DMD2, main/edm/edm_guidance.py, main/edm/train_edm.py,
experiments/imagenet]; `fastgen_*` are those of FastGen's recipe, whose DMD2 reaches 1.12 on ImageNet 64x64 where
the paper's has 1.28 [repo: NVlabs/FastGen, fastgen/methods/distribution_matching/dmd2.py, fastgen/configs].
"""

from __future__ import annotations

import functools

import jax

from sim_jax.objectives import dsm, weights
from sim_jax.objectives.base import Nets, Objective, Published, denoise, diffuse, expand, prediction_metrics, pseudo_target_loss
from sim_jax.types import Array, Cond, NoiseLevel


def pair_loss(
    nets: Nets,
    x0: Array,
    noise: Array,
    level: NoiseLevel,
    cond: Cond | None,
    scale: Array | float = 1.0,
    *,
    weighting: str = "dmd",
    normaliser_eps: float | None = None,
    sigma_power: float | None = None,
    reduction: str = "mean",
) -> tuple[Array, dict[str, Array]]:
    """The distribution-matching loss of x0 = G(z): its gradient in x0 is g (over CHW with reduction "mean").

    Args:
      nets: `teacher` (D_real) and `fake` (D_fake), evaluated only. x0, noise: [B,H,W,C]. level: of x_t,
      entries [B]. cond: passed to both networks. scale: [B], constant, multiplies g; of the methods that build on
      this one. weighting: of D_fake - D_real, a row of `weights.GENERATOR`; normaliser_eps is the knob of "dmd",
      sigma_power that of "paper". reduction: "mean" or "sum" over CHW.

    Returns:
      loss [B]; metrics [B]: those of `base.prediction_metrics`.

    Raises:
      ValueError: unknown weighting or reduction, or a knob that the weighting does not have or out of range.
    """
    weight = weights.get(weighting, normaliser_eps=normaliser_eps, sigma_power=sigma_power)
    x_t = jax.lax.stop_gradient(diffuse(x0, noise, level))
    fake = denoise(nets.fake, x_t, level, cond)
    real = denoise(nets.teacher, x_t, level, cond)
    gradient = expand(scale * weight(level, x0, real), x0) * (fake - real)
    return pseudo_target_loss(x0, gradient, reduction=reduction), prediction_metrics(fake, real, x0)


OBJECTIVE = Objective(
    name="dmd2",
    pair_loss=pair_loss,
    critic_loss=functools.partial(dsm.pair_loss, weighting="dmd2", reduction="mean"),
    critic_steps=5,
    needs=frozenset({"teacher", "fake"}),
    published={
        "critic_steps": Published(5, "repo", "ImageNet 64x64, one of the five on the generator's turn and images; 10 for SD 1.5"),
        "init_sigma": Published(80.0, "repo", "G(z) = D(80 z; 80)"),
        "learning_rate": Published(2e-6, "repo", "both networks; 5e-7 where the run without GAN goes on with it"),
        "adam_betas": Published((0.9, 0.999), "repo", "AdamW"),
        "weight_decay": Published(0.01, "repo"),
        "warmup_steps": Published(500, "repo", "then constant; the code divides it by the number of devices"),
        "clip_norm": Published(10.0, "repo", "both networks"),
        "batch": Published(280, "repo", "ImageNet 64x64: 40 on each of 7 devices"),
        "ema": Published(None, "repo", "the generator's weights are not averaged"),
        "grid": Published((20, 981), "repo", "generator's levels: entries of 1000 on the Karras grid from 0.002 to 80"),
        "critic_grid": Published((0, 1000), "repo", "the fake score's and the GAN's levels"),
        "adversarial_weight": Published(3e-3, "repo", "ImageNet 64x64; 1e-3 SD 1.5, 5e-3 SDXL; with the mean over CHW"),
        "discriminator_weight": Published(1e-2, "repo", "a head on the fake score's bottleneck, which it trains too"),
        "normaliser_eps": Published(0.0, "repo", "nan_to_num of the quotient, see `weights.py`"),
        "fastgen_critic_steps": Published(4, "repo", "the generator moves on every fifth iteration, the critic on the others"),
        "fastgen_learning_rate": Published(1e-4, "repo", "CIFAR-10, all networks; 2e-6 for ImageNet 64x64"),
        "fastgen_batch": Published(2048, "repo", "CIFAR-10, 100k iterations; 512 and 600k for ImageNet 64x64"),
        "fastgen_grid": Published((2, 999), "repo", "every network's levels"),
        "fastgen_ema": Published((0.9999, 0.99995, 0.9996), "repo", "decay per iteration"),
        "fastgen_critic": Published(dict(weighting="none", reduction="mean"), "repo", "of the x0-prediction"),
        "fastgen_adversarial_weight": Published(1e-3, "repo", "CIFAR-10; 3e-3 for ImageNet 64x64; at the matching loss's x_t"),
        "fastgen_discriminator_weight": Published(1.0, "repo", "on the frozen teacher's features: 32, 16, 8 (CIFAR-10)"),
        "fastgen_normaliser_eps": Published(1e-6, "repo"),
    },
)
