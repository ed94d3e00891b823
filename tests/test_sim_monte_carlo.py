"""SIM in 8-D by Monte Carlo: x0 = A z + b as an image [2,2,2], a Gaussian teacher with a full covariance."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sim_jax.objectives import sim
from sim_jax.objectives.base import Nets
from sim_jax.types import NoiseLevel
from test_sim_closed_form import DISTANCES, stop, stop_inputs

DIM, COUNT, BATCHES, IMAGE = 8, 40_000, 40, (2, 2, 2)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def affine_denoiser(mean, covariance):
    """The exact denoiser of N(mean, covariance) in variance-exploding form, one noise level for the batch."""
    def apply(x, s, cond):
        flat = x.reshape(x.shape[0], DIM)
        gain = covariance @ jnp.linalg.inv(covariance + s[0] ** 2 * jnp.eye(DIM))
        return (mean[None] + (flat - mean[None]) @ gain.T).reshape(x.shape)

    return apply


@functools.cache
def problem_8d():
    rng = np.random.default_rng(0)
    matrix = 0.6 * np.eye(DIM) + 0.25 * rng.standard_normal((DIM, DIM))
    root = np.eye(DIM) + 0.3 * rng.standard_normal((DIM, DIM))
    return matrix, 0.4 * rng.standard_normal(DIM), root @ root.T, 0.4 * rng.standard_normal(DIM)


def divergence_samples(theta, x, sigma, radial, space):
    """d(s_theta(x) - s_q(x)) at fixed x [N,8]."""
    (matrix, shift), (_, _, covariance, mean) = theta, problem_8d()
    eye = sigma**2 * jnp.eye(DIM)
    score_p = -(x - shift[None]) @ jnp.linalg.inv(matrix @ matrix.T + eye)
    score_q = -(x - mean[None]) @ jnp.linalg.inv(covariance + eye)
    y = (score_p - score_q) * (sigma**2 if space == "x0" else 1.0)
    return jnp.mean(radial(jnp.sum(y**2, axis=1)))


def monte_carlo(distance, space, sigma, cut=()):
    """(per-sample SIM gradients [N, 72], true gradient [72], the latter's standard errors [72])."""
    matrix, shift, covariance, mean = (jnp.asarray(part) for part in problem_8d())
    keys = jax.random.split(jax.random.key(7), 4)
    z, noise, z_true, noise_true = (jax.random.normal(key, (COUNT, DIM)) for key in keys)
    level = NoiseLevel(jnp.full(COUNT, sigma), jnp.ones(COUNT), jnp.full(COUNT, sigma))
    nets = Nets(teacher=affine_denoiser(mean, covariance), fake=affine_denoiser(shift, matrix @ matrix.T))
    nets = stop_inputs(nets, cut)
    knobs, radial = DISTANCES[distance]

    @jax.jit
    def ours(z, noise):
        def total(x0):
            noise_image = noise.reshape((-1, *IMAGE))
            return jnp.sum(sim.pair_loss(nets, x0, noise_image, level, None, space=space, **knobs)[0])

        # theta enters through x0 = A z + b alone: its gradient is the outer product of dL/dx0 with (z, 1)
        by_x0 = jax.grad(total)((z @ matrix.T + shift[None]).reshape((-1, *IMAGE))).reshape(-1, DIM)
        inputs = jnp.concatenate([z, jnp.ones((COUNT, 1))], 1)
        return (by_x0[:, :, None] * inputs[:, None, :]).reshape(COUNT, -1)

    @jax.jit
    def truth(z, noise):
        points = (z @ matrix.T + shift[None] + sigma * noise).reshape(BATCHES, -1, DIM)
        one = jax.grad(functools.partial(divergence_samples, sigma=sigma, radial=radial, space=space))
        by_matrix, by_shift = jax.lax.map(functools.partial(one, (matrix, shift)), points)
        batches = jnp.concatenate([by_matrix, by_shift[:, :, None]], 2).reshape(BATCHES, -1)
        return batches.mean(0), batches.std(0, ddof=1) / np.sqrt(BATCHES)

    return np.asarray(ours(z, noise)), *map(np.asarray, truth(z_true, noise_true))


@pytest.mark.parametrize("space,sigma", [("score", 1.2), ("x0", 0.6)])
@pytest.mark.parametrize("distance", DISTANCES)
def test_unbiased_8d(distance, space, sigma):
    ours, truth, truth_error = monte_carlo(distance, space, sigma)
    error = np.sqrt(ours.var(0, ddof=1) / COUNT + truth_error**2)
    assert np.abs((ours.mean(0) - truth) / error).max() < 5.0
    # along the true gradient: the factor is one, and known well enough to tell it from a wrong one
    factor = ours @ truth / (truth @ truth)
    spread = np.sqrt(factor.var(ddof=1) / COUNT + np.sum((truth * truth_error) ** 2) / (truth @ truth) ** 2)
    assert spread < 0.02
    assert abs(factor.mean() - 1.0) < 5 * spread


@pytest.mark.parametrize("cut", [("teacher",), ("fake",)])
def test_unbiased_8d_can_fail(cut):
    """Negative control: the gradient stopped at one network's input is more than 20 standard errors off."""
    ours, truth, truth_error = monte_carlo("pseudo_huber", "score", 1.2, cut)
    factor = ours @ truth / (truth @ truth)
    assert abs(factor.mean() - 1.0) > 20 * factor.std() / np.sqrt(COUNT)


def test_squared_l2_8d_exact():
    """For d = ||y||^2, y = M x + m affine and x ~ N(b, S): E d = tr(M S M^T) + ||M b + m||^2 exactly."""
    matrix, shift, covariance, mean = (jnp.asarray(part) for part in problem_8d())
    sigma = 1.2

    def expected(theta):
        matrix, shift = theta
        noised = matrix @ matrix.T + sigma**2 * jnp.eye(DIM)
        p, q = jnp.linalg.inv(noised), jnp.linalg.inv(covariance + sigma**2 * jnp.eye(DIM))
        bias = (q - p) @ stop(shift) + p @ shift - q @ mean
        return jnp.trace((q - p) @ stop(noised) @ (q - p).T) + bias @ bias

    by_matrix, by_shift = jax.jit(jax.grad(expected))((matrix, shift))
    ours, _, _ = monte_carlo("squared_l2", "score", sigma)
    error = ours.std(0) / np.sqrt(COUNT)
    truth = np.concatenate([by_matrix, by_shift[:, None]], 1).ravel()
    assert np.abs((ours.mean(0) - truth) / error).max() < 5.0


def test_vanishes_at_the_teachers_distribution_8d():
    """Sample by sample, where A A^T is the teacher's covariance but A is not its Cholesky factor."""
    _, _, covariance, mean = (jnp.asarray(part) for part in problem_8d())
    rotation = jnp.linalg.qr(jax.random.normal(jax.random.key(3), (DIM, DIM)))[0]
    matrix = jnp.linalg.cholesky(covariance) @ rotation
    nets = Nets(teacher=affine_denoiser(mean, covariance), fake=affine_denoiser(mean, matrix @ matrix.T))
    z, noise = jax.random.normal(jax.random.key(4), (2, 64, DIM))
    level = NoiseLevel(jnp.full(64, 0.8), jnp.ones(64), jnp.full(64, 0.8))

    def total(x0, knobs):
        return jnp.sum(sim.pair_loss(nets, x0, noise.reshape((-1, *IMAGE)), level, None, **knobs)[0])

    x0 = (z @ matrix.T + mean[None]).reshape((-1, *IMAGE))
    for knobs, _ in DISTANCES.values():
        for space in ("score", "x0"):
            grad = jax.grad(total)(x0, knobs | {"space": space})
            np.testing.assert_allclose(grad, 0.0, atol=1e-10)
