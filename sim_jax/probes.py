"""Signals that say whether a distillation works, which the losses do not.

On held-out noise z, classes and noise n, at noise levels sigma that cut the generator's own distribution into equal parts, with
x_0 = G(z), x_t = x_0 + sigma n, f = D_fake(x_t), r = D_real(x_t):

    divergence/sigmaS    mean (f - r)^2 / S^2  =  S^2 mean (s_f - s_r)^2      the score divergence per level; 0 is the goal
    fake_score/lag       sum <f - x_0, f - r> / S^2  over  sum |f - r|^2 / S^2

The lag tells how far the fake score is behind its generator. E[x_0 | x_t] is the score that it should have, so the numerator is
<f - E[x_0 | x_t], f - r>: zero where the fake score is exact for the present generator, one where its difference to the teacher is
all error (that is, where the generator matches the teacher but the fake score does not know it).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from sim_jax import randomness, steps
from sim_jax.data.labels import one_hot
from sim_jax.diffusion import noise_levels
from sim_jax.state import DistillState
from sim_jax.types import Array, Cond, Key, Params


def probe_levels(name: str, num: int = 6, **knobs) -> np.ndarray:
    """The middles of `num` equally likely parts of a noise-level distribution, [num] float64."""
    return np.asarray(noise_levels.quantile(name, (np.arange(num) + 0.5) / num, **knobs), np.float64)


def make_probe(recipe: steps.Recipe, sigmas: np.ndarray, *, count: int) -> Callable[[DistillState, Params, Key], dict[str, Array]]:
    """`probe(state, teacher_params, key) -> scalars`, pure and to be jitted; `count` images per noise level."""
    gather, split = recipe.layout.gather, recipe.layout.split
    network = recipe.generator.network

    def draw(key: Key, purpose: str, index: Array) -> Array:
        return split(randomness.normal(randomness.sample_keys(key, purpose, index), network.image_shape))

    def probe(state: DistillState, teacher_params: Params, key: Key) -> dict[str, Array]:
        index = jnp.arange(count, dtype=jnp.uint32)
        classes = recipe.labels(randomness.sample_keys(key, "probe/class", index), index)
        cond = Cond(class_labels=one_hot(classes, network.label_dim))
        x0 = steps.generate(network, gather(state.generator.params), draw(key, "probe/z", index), cond, sigma_init=recipe.sigma_init)
        fake = recipe.fake_score.network.bind(gather(state.fake_score.params))
        teacher = recipe.teacher.bind(gather(teacher_params))
        out, error, total = {}, 0.0, 0.0
        for i, sigma in enumerate(sigmas.tolist()):
            x_t = x0 + sigma * draw(key, f"probe/noise{i}", index)
            level = jnp.full((count,), sigma, jnp.float32)
            f, r = fake(x_t, level, cond), teacher(x_t, level, cond)
            squared = jnp.mean(jnp.square(f - r)) / sigma**2
            out[f"divergence/sigma{sigma:.3g}"] = squared
            error, total = error + jnp.mean((f - x0) * (f - r)) / sigma**2, total + squared
        return out | {"fake_score/lag": error / jnp.maximum(total, 1e-20)}

    return probe
