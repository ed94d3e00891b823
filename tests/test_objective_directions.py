"""Every method of the table with exact scores and density ratio: towards the teacher, and at rest once there.

Normal distributions in 32 dimensions: normalisers by the mean over a sample's elements, infinite in expectation in one
dimension, are what they are meant to be.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sim_jax import objectives
from sim_jax.objectives.base import Nets, expand, sum_chw
from sim_jax.types import NoiseLevel
from test_objectives import ROWS
from test_sim_closed_form import float64  # noqa: F401  (a fixture)

# the generator is x0 = theta[0] z + theta[1], z a standard normal variable of this shape; so is the teacher
SHAPE, COUNT = (4, 4, 2), 1024
TEACHER = (1.4, 0.7)
methods = pytest.mark.parametrize("row", [row for row, (name, _) in ROWS.items() if "teacher" in objectives.TABLE[name].needs])


def denoiser(theta):
    """E[x0 | x] of that distribution, in variance-exploding form."""
    return lambda x, s, cond: theta[1] + expand(theta[0] ** 2 / (theta[0] ** 2 + s**2), x) * (x - theta[1])


def log_density(theta, x, s):
    variance = theta[0] ** 2 + s**2
    return -sum_chw(jnp.square(x - theta[1])) / (2 * variance) - x[0].size / 2 * jnp.log(variance)


@functools.cache
def descent(row):
    """(theta, teacher) -> minus the mean gradient of the loss in theta, over three levels."""
    method, knobs = ROWS[row]
    objective = objectives.get(method, **knobs)
    z, noise = jax.random.normal(jax.random.key(0), (2, 3 * COUNT, *SHAPE))
    sigma, alpha = jnp.tile(jnp.asarray([0.5, 2.0, 0.8]), COUNT), jnp.tile(jnp.asarray([1.0, 1.0, 0.6]), COUNT)

    def mean_loss(theta, teacher):
        here = jax.lax.stop_gradient(theta)
        networks = Nets(teacher=denoiser(teacher), fake=denoiser(here), discriminate=lambda x, s, cond: (
            log_density(teacher, x, s) - log_density(here, x, s))[:, None])
        x0 = theta[0] * z + theta[1]
        return jnp.mean(objective.pair_loss(networks, x0, noise, NoiseLevel(sigma, alpha, sigma), None)[0])

    return jax.jit(lambda theta, teacher: -jax.grad(mean_loss)(jnp.asarray(theta), jnp.asarray(teacher)))


@methods
def test_moves_towards_the_teacher(row):
    """Each of the generator's parameters goes the right way, from either side."""
    assert bool((descent(row)((0.8, -0.4), TEACHER) > 0).all())
    assert bool((descent(row)((2.0, 1.6), TEACHER) < 0).all())


@methods
def test_rests_at_the_teachers_distribution(row):
    """Also where the generator is a mirror image of the teacher."""
    for theta in (TEACHER, (-TEACHER[0], TEACHER[1])):
        np.testing.assert_allclose(descent(row)(theta, TEACHER), 0.0, atol=1e-9)
