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
        # All levels of an image lie side by side in one batch: two network calls to compile, and no image leaves its device.
        levels = len(sigmas)
        noise = jnp.stack([draw(key, f"probe/noise{i}", index) for i in range(levels)], axis=1)
        x0, cond = jax.tree.map(lambda a: jnp.repeat(a, levels, axis=0), (x0, cond))
        sigma = jnp.tile(jnp.asarray(sigmas, jnp.float32), count)
        x_t = x0 + sigma[:, None, None, None] * noise.reshape(x0.shape)
        f = recipe.fake_score.network.bind(gather(state.fake_score.params))(x_t, sigma, cond)
        r = recipe.teacher.bind(gather(teacher_params))(x_t, sigma, cond)

        def per_level(products: Array) -> Array:
            return jnp.mean(products.reshape(count, levels, -1), (0, 2)) / jnp.square(jnp.asarray(sigmas, jnp.float32))

        squared, error = per_level(jnp.square(f - r)), per_level((f - x0) * (f - r))
        out = {f"divergence/sigma{s:.3g}": squared[i] for i, s in enumerate(sigmas.tolist())}
        return out | {"fake_score/lag": jnp.sum(error) / jnp.maximum(jnp.sum(squared), 1e-20)}

    return probe
