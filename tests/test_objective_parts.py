"""What the methods are made of: distances, weightings of a generator's loss, and the spaces of SIM's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sim_jax.objectives import distances, sim, weights
from sim_jax.objectives.base import denoise, expand, mean_chw, score_scale, sum_chw
from sim_jax.types import NoiseLevel
from test_objectives import BATCH, inputs, nets


@pytest.mark.parametrize("name,knobs", [
    ("pseudo_huber", dict(c=0.3)), ("squared_l2", {}), ("power", dict(p=0.5, eps=0.1)),
    ("power", dict(p=3.0)), ("power", dict(p=4.0)), ("l2", {}),
])
def test_gradient_of_a_distance(name, knobs):
    """d' is the derivative of d; d(0) = 0 and d'(0) = 0; d >= 0."""
    d = distances.get(name, **knobs)
    y = jax.random.normal(jax.random.key(0), (5, 3, 3, 2))
    y = y * expand(jnp.asarray([0.0, 1e-3, 0.1, 1.0, 10.0]), y)
    assert d.value(y).shape == (5,) and bool((d.value(y) >= 0).all())
    np.testing.assert_allclose(d.value(y)[0], 0.0, atol=1e-7)
    assert not d.gradient(y)[0].any()
    by_autodiff = jax.grad(lambda y: jnp.sum(d.value(y)))(y)
    np.testing.assert_allclose(d.gradient(y), by_autodiff, rtol=1e-5, atol=1e-7)


def test_distances_by_hand():
    """||y|| = 5 over all the elements of one sample."""
    y = jnp.asarray([3.0, 0.0, 0.0, 4.0]).reshape(1, 2, 2, 1)
    np.testing.assert_allclose(distances.get("pseudo_huber", c=12.0).value(y), [1.0], rtol=1e-6)
    np.testing.assert_allclose(distances.get("pseudo_huber", c=12.0).gradient(y), y / 13, rtol=1e-6)
    np.testing.assert_allclose(distances.get("squared_l2").value(y), [25.0])
    np.testing.assert_allclose(distances.get("squared_l2").gradient(y), 2 * y)
    np.testing.assert_allclose(distances.get("l2").value(y), [5.0], rtol=1e-4)
    np.testing.assert_allclose(distances.get("l2").gradient(y), y / 5, rtol=1e-6)
    np.testing.assert_allclose(distances.get("power", p=3.0).value(y), [125.0], rtol=1e-6)
    np.testing.assert_allclose(distances.get("power", p=3.0).gradient(y), 15 * y, rtol=1e-6)


def test_distances_meet():
    """power(2) = squared_l2, l2(eps) = pseudo_huber(eps), pseudo_huber(c) -> squared_l2 / 2c at large c."""
    y = jax.random.normal(jax.random.key(1), (6, 4, 4, 2))
    squared, power = distances.get("squared_l2"), distances.get("power", p=2.0)
    l2, huber = distances.get("l2", eps=0.3), distances.get("pseudo_huber", c=0.3)
    wide = distances.get("pseudo_huber", c=1e3)
    np.testing.assert_allclose(power.gradient(y), squared.gradient(y), rtol=1e-6)
    np.testing.assert_allclose(l2.gradient(y), huber.gradient(y), rtol=1e-6)
    np.testing.assert_allclose(2e3 * wide.value(y), squared.value(y), rtol=1e-4)


def test_weightings_by_hand():
    level = NoiseLevel(*jnp.asarray([[0.0, 0.0], [1.0, 0.5], [2.0, 2.0]]))
    x0 = jnp.zeros((2, 2, 2, 1))
    real = x0.at[0, 0, :, 0].set(jnp.asarray([1.0, -3.0]))
    np.testing.assert_array_equal(weights.get("none")(level, x0, real), [1.0, 1.0])
    np.testing.assert_allclose(weights.get("paper", sigma_power=2.0)(level, x0, real), [4.0, 16.0], rtol=1e-6)
    np.testing.assert_allclose(weights.get("sid")(level, x0, real), [1.0, 1e5], rtol=1e-6)
    np.testing.assert_allclose(weights.get("dmd")(level, x0, real), [1.0, 1e6], rtol=2e-6)
    np.testing.assert_allclose(weights.get("dmd", normaliser_eps=1.0)(level, x0, real), [0.5, 1.0], rtol=1e-6)
    np.testing.assert_array_equal(weights.get("dmd", normaliser_eps=0.0)(level, x0, real), [1.0, 0.0])
    for name in ("sid", "dmd"):
        assert not jax.grad(lambda x: weights.get(name)(level, x, real).sum())(x0).any()


def test_spaces_differ_by_weight_and_c():
    """L_score(w, c) = L_x0(w k, c / k), k = 1 / sigma^2: at one level, c' = c sigma^2 and w' = w sigma^-2."""
    sigma, c = 3.0, 0.2
    x0, noise, level = inputs((sigma,) * BATCH)
    score, _ = sim.pair_loss(nets(), x0, noise, level, None, space="score", c=c)
    knobs = dict(c=c * sigma**2, weighting="paper", sigma_power=-2.0)
    images, _ = sim.pair_loss(nets(), x0, noise, level, None, space="x0", **knobs)
    np.testing.assert_allclose(score, images, rtol=1e-5)


def test_sim_is_written_in_scores():
    """The x0 form equals - d'(y)^T (s_psi - grad log q_t(x_t|x0)), scores spelled out, at alpha != 1."""
    x0, noise, level = inputs((0.4, 0.8, 1.0, 1.3), (0.9, 0.6, 0.8, 0.3))
    alpha, sigma = expand(level.alpha, x0), expand(level.sigma, x0)
    x_t = alpha * x0 + sigma * noise
    fake = (alpha * denoise(nets().fake, x_t, level, None) - x_t) / sigma**2
    real = (alpha * denoise(nets().teacher, x_t, level, None) - x_t) / sigma**2
    y = fake - real
    expected = -sum_chw(y / jnp.sqrt(expand(sum_chw(y**2), y) + 0.7**2) * (fake + noise / sigma))
    loss, metrics = sim.pair_loss(nets(), x0, noise, level, None, space="score", c=0.7)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["divergence"], jnp.sqrt(sum_chw(y**2) + 0.49) - 0.7, rtol=1e-4)
    in_scores = metrics["score_divergence"] * score_scale(level) ** 2
    np.testing.assert_allclose(in_scores, mean_chw(y**2), rtol=1e-4)
