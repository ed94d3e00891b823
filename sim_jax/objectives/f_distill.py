"""f-distill: https://arxiv.org/abs/2502.15681 (Xu, Nie, Vahdat; 2025), DMD2 weighed by the density ratio.

For D_f(q || p) = E_p f(r) with r = q / p between the noised distributions of teacher and generator,

    grad D_f = E_{x0 = G_theta(z), x_t ~ q_t(.|x0)} [ h(r(x_t)) ( s_psi(x_t) - s_q(x_t) ) ]^T d x_t / d theta

with h(r) = f''(r) r^2 (`f_divergences.py`), constant like all else in the bracket. So the loss is DMD2's with
h(r) inside the pseudo-target; reverse KL, h = 1, is DMD2. r = exp(mean logit) of the discriminator at the same
x_t, clipped to [ratio_lower, ratio_upper]. Two normalisations tame it, each one a heuristic that may be off:

    normalise_ratio    r / (mean of r in the sample's bin of noise levels), K bins of equal width of s = sigma /
                       alpha in [bin_min, bin_max]. The mean of a bin moves with every batch that has samples in
                       it: ema_rate * old + (1 - ema_rate) * the batch's, and includes the batch at hand.
    normalise_weight   h / (mean of h over the batch)

"The batch" is what the loss is called on: all devices' samples, but one micro-batch, of which each has its own
statistics, as with gradient accumulation in FastGen. The old means are `Nets.memory`, [K]; they move once an
iteration, by the whole batch, and with ratio_ema_rate = 0, FastGen's default, they do not enter. Few samples in a bin
take their own weight away (one sample's ratio becomes 1). The published bins of sigma put 64% of the levels of
the Karras grid into the first of ten; bin_space "log_sigma" is ours.

Provenance: [repo: NVlabs/FastGen, fastgen/methods/distribution_matching/f_distill.py,
fastgen/configs/methods/config_f_distill.py]; its clamp of the logits to +-10 is implied by the clip, and its guards
of 1e-6 in the quotients are left out, as r >= ratio_lower > 0. It adds the adversarial term, as in `dmd2.py`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp

from sim_jax.objectives import dmd2, dsm, f_divergences
from sim_jax.objectives.base import Nets, Published, check_number, diffuse, look_up
from sim_jax.types import Array, Cond, NoiseLevel

BIN_SPACES = {"sigma": lambda s: s, "log_sigma": jnp.log}


def init_memory(*, num_bins: int = 10) -> Array:
    """The mean ratio in each bin before anything was seen: ones [num_bins]."""
    if isinstance(num_bins, bool) or not isinstance(num_bins, int) or num_bins < 1:
        raise ValueError(f"num_bins: got {num_bins!r}, allowed: integers >= 1")
    return jnp.ones(num_bins, jnp.float32)


def update_memory(memory: Array, means: Mapping[str, Array], *, ratio_ema_rate: float = 0.0) -> Array:
    """The mean ratio in each bin [K] after a batch: `count` [K], the share of its samples in each bin, and `ratio`
    [K], the mean of (ratio if in the bin, else 0)."""
    check_number("ratio_ema_rate", ratio_ema_rate, "0 <= ratio_ema_rate < 1", lambda v: 0 <= v < 1)
    seen = means["count"] > 0
    new = means["ratio"] / jnp.where(seen, means["count"], 1.0)
    return jnp.where(seen, ratio_ema_rate * memory + (1.0 - ratio_ema_rate) * new, memory)


def _bins(level: NoiseLevel, space: str, low: float, high: float, num_bins: int) -> Array:
    """Which bin each level lies in, one-hot [B,K]; those outside [low, high] go to the outermost."""
    check_number("bin_min", low, "0 < bin_min < bin_max", lambda v: v > 0)
    check_number("bin_max", high, "bin_min < bin_max < inf", lambda v: low < v < math.inf)
    scale = look_up("bin_space", BIN_SPACES, space)
    first, last = scale(jnp.float32(low)), scale(jnp.float32(high))
    index = jnp.floor((scale(level.sigma / level.alpha) - first) / (last - first) * num_bins)
    return jax.nn.one_hot(jnp.clip(index, 0, num_bins - 1), num_bins, dtype=level.sigma.dtype)


def pair_loss(
    nets: Nets,
    x0: Array,
    noise: Array,
    level: NoiseLevel,
    cond: Cond | None,
    *,
    divergence: str = "js",
    ratio_lower: float = 0.1,
    ratio_upper: float = 20.0,
    normalise_ratio: bool = True,
    normalise_weight: bool = True,
    num_bins: int = 10,
    bin_space: str = "sigma",
    bin_min: float = 0.002,
    bin_max: float = 80.0,
    ratio_ema_rate: float = 0.0,
    weighting: str = "dmd",
    normaliser_eps: float | None = None,
    sigma_power: float | None = None,
    reduction: str = "mean",
) -> tuple[Array, dict[str, Array]]:
    """DMD2's loss of x0 = G(z), its gradient in x0 multiplied by the normalised h(r).

    Args:
      nets: `teacher`, `fake` and `discriminate`, evaluated only; `memory` [num_bins], or None for a first call.
      x0, noise, level, cond, weighting, normaliser_eps, sigma_power, reduction: as in `dmd2.pair_loss`.
      divergence: a row of `f_divergences.TABLE`. The other knobs: see the top of this file.

    Returns:
      loss [B]; metrics [B]: `density_ratio` r before and `divergence_weight` h after the normalisations, those of
      `base.prediction_metrics`, and for `update_memory` `memory/count` and `memory/ratio` [B,K].

    Raises:
      ValueError: an unknown name, or a knob out of range.
    """
    h = look_up("divergence", f_divergences.TABLE, divergence)
    x_t = diffuse(x0, noise, level)
    ratio = jnp.exp(f_divergences.log_ratio(nets, x_t, level, cond, lower=ratio_lower, upper=ratio_upper))
    bins = _bins(level, bin_space, bin_min, bin_max, num_bins)
    seen = {"count": bins, "ratio": bins * ratio[:, None]}
    memory = init_memory(num_bins=num_bins) if nets.memory is None else nets.memory
    means = update_memory(memory, {k: jnp.mean(v, axis=0) for k, v in seen.items()}, ratio_ema_rate=ratio_ema_rate)
    weight = h(ratio / (bins @ means)) if normalise_ratio else h(ratio)
    if normalise_weight:
        weight = weight / jnp.mean(weight)
    loss, metrics = dmd2.pair_loss(nets, x0, noise, level, cond, weight, weighting=weighting,
                                   normaliser_eps=normaliser_eps, sigma_power=sigma_power, reduction=reduction)
    remember = {f"memory/{name}": value for name, value in seen.items()}
    return loss, {**metrics, **remember, "density_ratio": ratio, "divergence_weight": weight}


OBJECTIVE = replace(
    dmd2.OBJECTIVE,
    name="f_distill",
    pair_loss=pair_loss,
    critic_loss=functools.partial(dsm.pair_loss, weighting="none", reduction="mean"),
    critic_steps=4,
    needs=frozenset({"teacher", "fake", "discriminator", "data"}),
    init_memory=init_memory,
    update_memory=update_memory,
    published={
        **{k.removeprefix("fastgen_"): v for k, v in dmd2.OBJECTIVE.published.items() if k.startswith("fastgen_")},
        "init_sigma": Published(80.0, "repo", "G(z) = D(80 z; 80)"),
        "divergence": Published("js", "repo", "ImageNet 64x64, FID 1.11; \"kl\" for CIFAR-10, 1.85"),
        "ratio_ema_rate": Published(0.0, "repo", "CIFAR-10; 0.5 for ImageNet 64x64"),
        "ratio_clip": Published((0.1, 20.0), "repo", "ratio_lower, ratio_upper"),
        "num_bins": Published(10, "repo", "of equal width of sigma in [0.002, 80]"),
    },
)
