"""The adversarial term on diffused images, a separate piece that any method can take.

    L_G = E softplus( -l(x_t) ),   x_t = alpha G(z) + sigma noise                                (non-saturating)
    L_D = E softplus( l(x_t) ) + E softplus( -l(y_t) ),   y_t = alpha y + sigma' noise', y a real image

with l the logits of "real", as many as the discriminator has (a map's, a pyramid's), averaged. Adding noise of
random level to both sides is Diffusion-GAN, https://arxiv.org/abs/2206.02262; at the optimum

    l*(x_t) = log p_real(x_t) - log p_generated(x_t)

which is where `f_distill` and `uni` take their density ratio from. DMD2, https://arxiv.org/abs/2405.14867,
draws both sides' levels and noise independently [repo: main/edm/edm_guidance.py, compute_cls_logits]; SiDA,
https://arxiv.org/abs/2410.14919, shares them and clamps the generator's logits to +-10 [repo: branch sida,
sida_training/sida_loss.py]. Here the caller draws, and clamps or not; a clamped logit has no gradient.

Through which *parameters* gradients flow is the caller's business, as in `base.py`: the generator's update
holds the discriminator's constant and keeps its gradient in x_t.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from sim_jax.objectives.base import DiscriminateFn, check_number, diffuse, logits
from sim_jax.types import Array, Cond, NoiseLevel


def _clamped(scores: Array, clamp: float | None) -> Array:
    if clamp is None:
        return scores
    check_number("clamp", clamp, "None or 0 < clamp < inf", lambda v: 0 < v < math.inf)
    return jnp.clip(scores, -clamp, clamp)


def generator_loss(
    discriminate: DiscriminateFn,
    x0: Array,
    noise: Array,
    level: NoiseLevel,
    cond: Cond | None,
    *,
    clamp: float | None = None,
) -> tuple[Array, dict[str, Array]]:
    """softplus(-logit) at the diffused x0 = G(z), differentiable in x0.

    Args:
      discriminate: see `base.DiscriminateFn`. x0, noise: [B,H,W,C]. level: of x_t, entries [B]. cond: passed
      on. clamp: logits are clipped to +-clamp; `None` leaves them.

    Returns:
      loss [B]; metrics [B]: `fake_logit`, the mean logit before the clamp.

    Raises:
      ValueError: clamp not positive.
    """
    scores = logits(discriminate, diffuse(x0, noise, level), level, cond)
    loss = jnp.mean(jax.nn.softplus(-_clamped(scores, clamp)), axis=1)
    return loss, {"fake_logit": jnp.mean(scores, axis=1)}


def discriminator_loss(
    discriminate: DiscriminateFn,
    fake: Array,
    real: Array,
    fake_noise: Array,
    real_noise: Array,
    fake_level: NoiseLevel,
    real_level: NoiseLevel,
    fake_cond: Cond | None,
    real_cond: Cond | None,
    *,
    clamp: float | None = None,
) -> tuple[Array, dict[str, Array]]:
    """softplus(logit) at the diffused fake plus softplus(-logit) at the diffused real; both images constants.

    Args:
      discriminate: the network that is trained. fake, real, fake_noise, real_noise: [B,H,W,C]. fake_level,
      real_level: entries [B]. fake_cond, real_cond: passed on. clamp: as in `generator_loss`.

    Returns:
      loss [B]; metrics [B]: `fake_logit` and `real_logit`, mean logits before the clamp, and `accuracy`, the
      share of the logits of both sides that have the right sign.

    Raises:
      ValueError: clamp not positive.
    """
    fake, real = jax.lax.stop_gradient((fake, real))
    on_fake = logits(discriminate, diffuse(fake, fake_noise, fake_level), fake_level, fake_cond)
    on_real = logits(discriminate, diffuse(real, real_noise, real_level), real_level, real_cond)
    loss = jax.nn.softplus(_clamped(on_fake, clamp)) + jax.nn.softplus(-_clamped(on_real, clamp))
    right = 0.5 * ((on_fake < 0).astype(loss.dtype) + (on_real > 0).astype(loss.dtype))
    metrics = {"fake_logit": on_fake, "real_logit": on_real, "accuracy": right}
    return jnp.mean(loss, axis=1), {name: jnp.mean(value, axis=1) for name, value in metrics.items()}
