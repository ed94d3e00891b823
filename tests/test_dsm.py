"""Denoising score matching: its minimiser and its weights."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sim_jax.objectives import dsm, weights
from sim_jax.objectives.base import Nets
from sim_jax.types import NoiseLevel


def levels(sigma, alpha=None):
    sigma = jnp.asarray(sigma)
    return NoiseLevel(sigma, jnp.ones_like(sigma) if alpha is None else jnp.full_like(sigma, alpha), sigma)


def expected_loss(slope, offset, mean, variance, level, **knobs):
    """E L of D(x) = slope x + offset on N(mean, variance), by Gauss-Hermite quadrature over (x0, noise)."""
    nodes, mass = np.polynomial.hermite_e.hermegauss(8)
    mass = mass / mass.sum()
    x0, noise = (part.ravel()[:, None, None, None] for part in np.meshgrid(nodes, nodes, indexing="ij"))
    nets = Nets(fake=lambda x, sigma, cond: slope * x + offset)
    batch = jax.tree.map(lambda leaf: jnp.full(64, leaf), level)
    x0 = jnp.asarray(mean + np.sqrt(variance) * x0)
    loss, metrics = dsm.pair_loss(nets, x0, jnp.asarray(noise), batch, None, **knobs)
    outer = jnp.asarray(np.outer(mass, mass).ravel())
    return jnp.sum(loss * outer), jnp.sum(metrics["denoising_error"] * outer)


@pytest.mark.parametrize("alpha,sigma", [(1.0, 0.3), (1.0, 5.0), (0.6, 0.8)])
@pytest.mark.parametrize("weighting", weights.DENOISING)
def test_minimiser_is_the_posterior_mean(alpha, sigma, weighting):
    """On N(m, v): m + v / (v + s^2) (x - m), which leaves the error v s^2 / (v + s^2), s = sigma / alpha."""
    with jax.enable_x64(True):
        mean, variance, s = 0.4, 0.7, sigma / alpha
        gain = variance / (variance + s**2)
        loss = functools.partial(expected_loss, mean=mean, variance=variance, weighting=weighting,
                                 level=NoiseLevel(*map(jnp.asarray, (sigma, alpha, sigma))))
        best = (jnp.asarray(gain), jnp.asarray((1 - gain) * mean))
        _, error = loss(*best)
        np.testing.assert_allclose(error, variance * s**2 / (variance + s**2), rtol=1e-10)
        gradient, _ = jax.grad(loss, argnums=(0, 1), has_aux=True)(*best)
        np.testing.assert_allclose(gradient, 0.0, atol=1e-9)
        # and it is a strict minimum
        for step in ((1e-2, 0.0), (-1e-2, 0.0), (0.0, 1e-2), (0.0, -1e-2)):
            assert loss(best[0] + step[0], best[1] + step[1])[0] > loss(*best)[0]


def test_weights_by_hand():
    """EDM's lambda at s = 2, sigma_data = 0.5 is 4.25 / 1 and equals 1 / c_out^2; DMD2's is the same sum."""
    s = jnp.asarray([2.0, 0.002, 80.0])
    lam = weights.get_denoising("edm", sigma_data=0.5)(s)
    np.testing.assert_allclose(lam[0], 4.25, rtol=1e-6)
    c_out = s * 0.5 / jnp.sqrt(s**2 + 0.25)
    np.testing.assert_allclose(lam * c_out**2, 1.0, rtol=1e-5)
    np.testing.assert_allclose(weights.get_denoising("dmd2", sigma_data=0.5)(s), lam, rtol=1e-5)
    np.testing.assert_allclose(weights.get_denoising("eps", sigma_data=0.5)(s)[0], 0.25, rtol=1e-6)
    np.testing.assert_array_equal(weights.get_denoising("none", sigma_data=0.5)(s), 1.0)


def test_eps_weighting_is_the_noise_prediction_error():
    x0, noise = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 2))
    level = levels([0.3, 0.8, 2.0], alpha=0.6)
    fake = Nets(fake=lambda x, sigma, cond: jnp.tanh(x))
    loss, _ = dsm.pair_loss(fake, x0, noise, level, None, weighting="eps")
    alpha, sigma = (part[:, None, None, None] for part in (level.alpha, level.sigma))
    x_t = alpha * x0 + sigma * noise
    predicted_noise = (x_t - alpha * jnp.tanh(x_t / alpha)) / sigma
    np.testing.assert_allclose(loss, jnp.sum((predicted_noise - noise) ** 2, (1, 2, 3)), rtol=1e-4)


def test_generated_images_are_constants():
    """The fake score's loss does not move the generator, even if its output is passed undetached."""
    x0, noise = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 2))
    fake = Nets(fake=lambda x, sigma, cond: 0.5 * x)
    gradient = jax.grad(lambda x0: dsm.pair_loss(fake, x0, noise, levels([0.3, 0.8, 2.0]), None)[0].sum())(x0)
    assert not gradient.any()
