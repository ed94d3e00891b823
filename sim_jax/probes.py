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

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sim_jax import randomness, steps
from sim_jax.data.labels import condition
from sim_jax.diffusion import noise_levels, samplers
from sim_jax.objectives.base import diffuse
from sim_jax.recipe import Recipe
from sim_jax.state import DistillState
from sim_jax.types import Array, Cond, Key, NoiseLevel, Params


def probe_levels(name: str, num: int = 6, **knobs) -> np.ndarray:
    """The middles of `num` equally likely parts of a noise-level distribution, [num] float64."""
    return np.asarray(noise_levels.quantile(name, (np.arange(num) + 0.5) / num, **knobs), np.float64)


def run_levels(section: Mapping[str, Any], num: int = 6) -> np.ndarray:
    """Those of a config's `noise` section."""
    knobs = {key: value for key, value in section.items() if value is not None}
    return probe_levels(knobs.pop("name"), num, **knobs)


def held_out(recipe: Recipe, params: Params, key: Key, count: int, text: Mapping[str, Array] | None = None
             ) -> tuple[Array, Cond, Callable[[str], Array]]:
    """Images that no update sees, the same at every call: G(z) [count,H,W,C], its condition, and `noise(purpose)` of that shape.

    `text` has their captions, "text" [count,L,D] and "text_mask" [count,L]; None where the networks take none.
    """
    network, index = recipe.generator.network, jnp.arange(count, dtype=jnp.uint32)

    def noise(purpose: str) -> Array:
        return recipe.layout.split(randomness.normal(randomness.sample_keys(key, purpose, index), network.image_shape))

    classes = recipe.labels(randomness.sample_keys(key, "probe/class", index), index)
    cond = condition({"class": classes, **(text or {})}, network.label_dim)
    renoise = [noise(f"probe/renoise{k}") for k in range(1, len(recipe.plan.sigmas))]
    generator = network.bind(recipe.layout.gather(params))
    return samplers.few_step(generator, noise("probe/z"), renoise, cond, plan=recipe.plan), cond, noise


def at_levels(sigmas: np.ndarray, x0: Array, cond: Cond, noise: Callable[[str], Array]) -> tuple[Array, Array, NoiseLevel, Cond]:
    """x0, unit noise, levels and condition [count * L, ...]: all levels of an image lie side by side in one batch, so that there is
    one network call to compile, and no image leaves its device."""
    levels = len(sigmas)
    noises = jnp.stack([noise(f"probe/noise{i}") for i in range(levels)], axis=1).reshape(-1, *x0.shape[1:])
    sigma = jnp.tile(jnp.asarray(sigmas, jnp.float32), x0.shape[0])
    x0, cond = jax.tree.map(lambda a: jnp.repeat(a, levels, axis=0), (x0, cond))
    return x0, noises, NoiseLevel(t=sigma, alpha=jnp.ones_like(sigma), sigma=sigma), cond


def make_probe(recipe: Recipe, sigmas: np.ndarray, *, count: int) -> Callable[..., dict[str, Array]]:
    """`probe(state, teacher_params, key, text=None) -> scalars`, pure and to be jitted; `count` images per noise level."""

    def probe(state: DistillState, teacher_params: Params, key: Key, text: Mapping[str, Array] | None = None) -> dict[str, Array]:
        x0, noise, level, cond = at_levels(sigmas, *held_out(recipe, state.generator.params, key, count, text))
        x_t = diffuse(x0, noise, level)
        teacher, fake = steps.score_networks(recipe, state.fake_score.params, teacher_params)
        f, r = fake(x_t, level.sigma, cond), teacher(x_t, level.sigma, cond)

        def per_level(products: Array) -> Array:
            return jnp.mean(products.reshape(count, len(sigmas), -1), (0, 2)) / jnp.square(jnp.asarray(sigmas, jnp.float32))

        squared, error = per_level(jnp.square(f - r)), per_level((f - x0) * (f - r))
        out = {f"divergence/sigma{s:.3g}": squared[i] for i, s in enumerate(sigmas.tolist())}
        return out | {"fake_score/lag": jnp.sum(error) / jnp.maximum(jnp.sum(squared), 1e-20)}

    return probe
