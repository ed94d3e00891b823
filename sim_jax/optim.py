"""Optimisers from a config section, and the exponential moving average of parameters.

EMA is counted in images, as in EDM's training loop: after B more images,

    ema <- ema + (1 - beta) (params - ema),   beta = 0.5 ** (B / h),   h = min(halflife, rampup * images seen so far)

so the average starts as a copy of the first update and lengthens until it reaches its half-life.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import optax

from sim_jax.types import Array, Params

OPTIMIZERS = ("adam", "adamw", "radam", "sgd")
SCHEDULES = ("constant", "cosine", "linear")


def make_schedule(*, lr: float, warmup_steps: int, schedule: str, total_steps: int, final_fraction: float) -> optax.Schedule:
    """Linear warm-up to `lr`, then constant, or a cosine or straight line down to `final_fraction * lr` at `total_steps`."""
    if schedule not in SCHEDULES:
        raise ValueError(f"optimizer.schedule: got {schedule!r}, allowed: {', '.join(SCHEDULES)}")
    after = max(total_steps - warmup_steps, 1)
    main = {
        "constant": optax.constant_schedule(lr),
        "cosine": optax.cosine_decay_schedule(lr, after, alpha=final_fraction),
        "linear": optax.linear_schedule(lr, lr * final_fraction, after),
    }[schedule]
    if not warmup_steps:
        return main
    return optax.join_schedules([optax.linear_schedule(0.0, lr, warmup_steps), main], [warmup_steps])


def make_optimizer(*, name: str = "adam", lr: float = 1e-4, b1: float = 0.0, b2: float = 0.999, eps: float = 1e-8,
                   weight_decay: float = 0.0, clip_norm: float = 0.0, warmup_steps: int = 0, schedule: str = "constant",
                   final_fraction: float = 0.0, total_steps: int = 1) -> optax.GradientTransformation:
    """An optax chain: clip by global norm, adapt, decay weights, scale by the schedule.

    Args:
      name: "adam", "adamw" (decoupled decay), "radam" or "sgd". With b1 = 0 Adam needs no first moment, and none is kept: the
        same update as Adam(0, b2) in half of its memory.
      lr, b1, b2, eps, weight_decay: as usual; weight decay is for adamw and skips one-dimensional parameters.
      clip_norm: 0 clips nothing.
      warmup_steps, schedule, final_fraction, total_steps: see `make_schedule`.
    Raises: ValueError for names and ranges.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer.name: got {name!r}, allowed: {', '.join(OPTIMIZERS)}")
    for key, value, low, high in (("lr", lr, 0, 1e3), ("b1", b1, 0, 1), ("b2", b2, 0, 1), ("clip_norm", clip_norm, 0, 1e30),
                                  ("weight_decay", weight_decay, 0, 1e3), ("eps", eps, 0, 1), ("warmup_steps", warmup_steps, 0, 1e12),
                                  ("final_fraction", final_fraction, 0, 1e3)):
        exclusive = key in ("b1", "b2")
        if not low <= value <= high or (value == high and exclusive):
            raise ValueError(f"optimizer.{key}: got {value}, allowed: from {low:g} to {high:g}{' (exclusive)' if exclusive else ''}")
    if weight_decay and name != "adamw":
        raise ValueError(f"optimizer.weight_decay: got {weight_decay} with {name!r}, allowed: 0, or name 'adamw'")
    adapt = {
        "adam": lambda: _adam(b1, b2, eps),
        "adamw": lambda: _adam(b1, b2, eps),
        "radam": lambda: optax.scale_by_radam(b1, b2, eps),
        "sgd": optax.identity,
    }[name]()
    decay = optax.add_decayed_weights(weight_decay, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params))
    rate = make_schedule(lr=lr, warmup_steps=warmup_steps, schedule=schedule, total_steps=total_steps,
                         final_fraction=final_fraction)
    return optax.chain(
        optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(), adapt,
        decay if weight_decay else optax.identity(), optax.scale_by_learning_rate(rate))


def _adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    if b1:
        return optax.scale_by_adam(b1, b2, eps)
    return optax.scale_by_rms(b2, eps, eps_in_sqrt=False, bias_correction=True)


def ema_names(halflife_kimg: Sequence[float]) -> tuple[str, ...]:
    """One name per half-life, e.g. (0.5, 500) -> ("ema_0.5k", "ema_500k"); the first is the default for sampling."""
    return tuple(f"ema_{h:g}k" for h in halflife_kimg)


def ema_beta(images_seen: Array, batch_size: int, *, halflife_kimg: float, rampup: float) -> Array:
    """The factor beta of one update (module docstring); `rampup = 0` uses the full half-life from the start."""
    halflife = jnp.asarray(halflife_kimg * 1000.0, jnp.float32)
    if rampup:
        halflife = jnp.minimum(halflife, images_seen * rampup)
    return jnp.power(0.5, batch_size / jnp.maximum(halflife, 1e-8))


def update_ema(emas: Mapping[str, Params], params: Params, images_seen: Array, batch_size: int, *,
               halflife_kimg: Sequence[float], rampup: float) -> dict[str, Params]:
    """Moves every average towards `params`, by the images seen before this update."""
    out = {}
    for name, halflife in zip(ema_names(halflife_kimg), halflife_kimg, strict=True):
        beta = ema_beta(images_seen, batch_size, halflife_kimg=halflife, rampup=rampup)
        # Written as a step towards params, so that a constant stays exactly constant.
        out[name] = jax.tree.map(lambda e, p: e + (1 - beta) * (p - e), emas[name], params)
    return out
