"""What an iteration draws: the generator's images, noise and its levels, dropout, by sample and purpose."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from sim_jax import randomness, rollout
from sim_jax.data.labels import condition
from sim_jax.randomness import normal
from sim_jax.recipe import Levels, Recipe, Role
from sim_jax.types import Array, Cond, Key, NoiseLevel, Params


def sample_keys(key: Key, step: Array, purpose: str, index: Array) -> Key:
    """Keys [B] for samples `index` [B] of iteration `step`, independent between purposes."""
    return randomness.sample_keys(jax.random.fold_in(key, step), purpose, index)


def generate(recipe: Recipe, params: Params, key: Key, step: Array, turn: str, part: Mapping[str, Array]) -> tuple[Array, Cond]:
    """The generator's images x0 [B,H,W,C] of one turn, differentiable in `params`, and what they are conditioned on.

    Args:
      params: the generator's, whole.
      turn: whose draws: "critic" or "generator".
      part: "index" [B], the captions' "text" and "text_mask", and "image", "class" of real images where the generator is fed noised ones.
    """
    role, index, plan = recipe.generator, part["index"], recipe.plan
    split, shape = recipe.layout.split, recipe.image_shape
    z = split(normal(sample_keys(key, step, f"{turn}/z", index), shape))
    classes = recipe.labels(sample_keys(key, step, f"{turn}/label", index), index)
    images, renoise = None, []
    if len(plan.sigmas) > 1 and recipe.inputs == "data":
        images = part["image"]
        classes = jnp.where(rollout.is_first(index, plan), classes, part["class"])
    elif len(plan.sigmas) > 1:
        renoise = [split(normal(sample_keys(key, step, f"{turn}/renoise{k}", index), shape)) for k in range(1, len(plan.sigmas))]
    cond = condition({**part, "class": classes}, recipe.label_dim)
    keys = dropout_keys(role, key, step, "generator/dropout" if turn == "generator" else f"{turn}/generator_dropout", index)
    return rollout.generate(role.network, params, z, renoise, cond, plan=plan, images=images, dropout_keys=keys), cond


def dropout_keys(role: Role, key: Key, step: Array, purpose: str, index: Array) -> Key | None:
    """Keys [B] of a network that drops anything out; None for others."""
    spec = role.network.spec
    rates = [spec[name] for name in ("dropout", "label_dropout") if name in spec]
    return sample_keys(key, step, purpose, index) if any(rates) else None


def noise(recipe: Recipe, levels: Levels, key: Key, step: Array, purpose: str, index: Array) -> tuple[Array, NoiseLevel]:
    """Unit noise [B,H,W,C] and its levels [B]."""
    unit = normal(sample_keys(key, step, f"{purpose}/noise", index), recipe.image_shape)
    return recipe.layout.split(unit), recipe.layout.split(levels(sample_keys(key, step, f"{purpose}/level", index)))


def judged_noise(recipe: Recipe, scored: tuple[Array, NoiseLevel], levels: Levels, key: Key, step: Array, turn: str, index: Array,
                  *, real: bool) -> tuple[Array, NoiseLevel]:
    """The noise at which the discriminator sees generated or real images; `scored` is what the score loss of this turn uses."""
    pairing = recipe.adversary.pairing
    if pairing == "shared" or (pairing == "score" and not real):
        return scored
    return noise(recipe, recipe.adversary.role.noise if pairing == "own" else levels, key, step,
                  f"{turn}/gan_{'real' if real else 'fake'}", index)
