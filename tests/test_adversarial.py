"""The adversarial term and SiDA: by hand, at the optimum, and which inputs they differentiate."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sim_jax.objectives import adversarial, sid, sida
from sim_jax.objectives.base import diffuse, logits
from sim_jax.types import NoiseLevel
from test_objectives import discriminator, inputs, make_params, nets
from test_sim_closed_form import OTHER_NORMAL, TWO_MODES, float64, grid, log_density  # noqa: F401  (float64 is a fixture)
from test_sim_closed_form import discriminator as exact


def fixed(*values):
    """A discriminator with logits given, [B,L]."""
    return lambda x, s, cond: jnp.asarray(values, jnp.float32)


def test_generator_loss_by_hand():
    x0, noise, level = jax.tree.map(lambda leaf: leaf[:2], inputs())
    loss, metrics = adversarial.generator_loss(fixed((0.0, 2.0), (-30.0, 30.0)), x0, noise, level, None)
    np.testing.assert_allclose(loss, [(np.log(2) + np.log1p(np.exp(-2))) / 2, 15.0], rtol=1e-6)
    np.testing.assert_allclose(metrics["fake_logit"], [1.0, 0.0], atol=1e-6)
    loss, metrics = adversarial.generator_loss(fixed((0.0, 2.0), (-30.0, 30.0)), x0, noise, level, None, clamp=10.0)
    np.testing.assert_allclose(loss[1], (np.log1p(np.exp(10)) + np.log1p(np.exp(-10))) / 2, rtol=1e-6)
    np.testing.assert_allclose(metrics["fake_logit"], [1.0, 0.0], atol=1e-6)


def test_discriminator_loss_by_hand():
    x0, noise, level = jax.tree.map(lambda leaf: leaf[:2], inputs())
    values = {"fake": (1.0, -2.0), "real": (0.5, 3.0)}

    def discriminate(x, s, cond):
        return jnp.asarray(values[cond], jnp.float32)[:, None]

    loss, metrics = adversarial.discriminator_loss(discriminate, x0, -x0, noise, noise, level, level, "fake", "real")
    np.testing.assert_allclose(loss, np.log1p(np.exp([1.0, -2.0])) + np.log1p(np.exp([-0.5, -3.0])), rtol=1e-6)
    np.testing.assert_allclose(metrics["fake_logit"], [1.0, -2.0])
    np.testing.assert_allclose(metrics["real_logit"], [0.5, 3.0])
    np.testing.assert_allclose(metrics["accuracy"], [0.5, 1.0])


def test_each_side_has_its_own_noise_level_and_condition():
    x0, noise, level = inputs((0.1, 0.5, 2.0, 10.0), (1.0, 0.8, 0.6, 0.5))
    other = jax.tree.map(lambda leaf: leaf[::-1], level)
    seen = {}

    def spy(x, s, cond):
        seen[cond] = x, s
        return jnp.zeros((len(x), 1))

    adversarial.discriminator_loss(spy, x0, 2 * x0, noise, -noise, level, other, "fake", "real")
    for cond, image, n, at in (("fake", x0, noise, level), ("real", 2 * x0, -noise, other)):
        np.testing.assert_allclose(seen[cond][0], image + (at.sigma / at.alpha)[:, None, None, None] * n, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(seen[cond][1], at.sigma / at.alpha)


def test_who_gets_a_gradient():
    """The generator's image through the discriminator; of the discriminator's loss neither image, its parameters alone."""
    x0, noise, level = inputs()

    def by_generator(x0, params):
        return jnp.sum(adversarial.generator_loss(functools.partial(discriminator, params), x0, noise, level, None)[0])

    def by_discriminator(fake, real, params):
        return jnp.sum(adversarial.discriminator_loss(
            functools.partial(discriminator, params), fake, real, noise, noise, level, level, None, None)[0])

    x_t = diffuse(x0, noise, level)
    params = make_params(3)
    gradient = jax.grad(by_generator)(x0, params)
    expected = jax.grad(lambda x: -jnp.sum(jnp.mean(jax.nn.log_sigmoid(discriminator(params, x, level.sigma, None)), axis=1)))(x_t)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7)
    fake, real, weights = jax.grad(by_discriminator, argnums=(0, 1, 2))(x0, -x0, params)
    assert not fake.any() and not real.any() and bool(weights["w"].any())
    # a step of either lowers what it says
    stepped = by_generator(x0 - 1e-2 * gradient, params)
    assert stepped < by_generator(x0, params)


def test_a_clamped_logit_has_no_gradient():
    x0, noise, level = inputs()

    def gradient(clamp):
        return jax.grad(lambda x: jnp.sum(adversarial.generator_loss(
            lambda *args: -12 - nets().discriminate(*args), x, noise, level, None, clamp=clamp)[0]))(x0)

    assert not gradient(10.0).any()
    assert gradient(20.0).any() and gradient(None).any()


@pytest.mark.parametrize("alpha,sigma", [(1.0, 0.5), (0.6, 0.8)])
def test_the_optimum_is_the_log_density_ratio(alpha, sigma):
    """E_p softplus(l) + E_q softplus(-l) is stationary at l = log q / p, in the directions 1, x and x^2, and nowhere near it."""
    nodes, step = grid(14.0, 0.02)
    generated, data = (jnp.asarray(part) for part in (TWO_MODES, OTHER_NORMAL))
    level = NoiseLevel(*(jnp.full(len(nodes), value) for value in (sigma, alpha, sigma)))
    zero = jnp.zeros((len(nodes), 1, 1, 1))
    p, q = (step * jnp.exp(jax.vmap(functools.partial(log_density, m, alpha, sigma))(jnp.asarray(nodes))) for m in (generated, data))

    def mean(bias):
        """Both sides' x_t are the nodes, each loss weighed by its own density."""
        def discriminate(x, s, cond):
            at = x[:, 0, 0, 0]
            return exact(data, generated)(x, s, cond) + (bias[0] + bias[1] * at + bias[2] * at**2)[:, None]

        noise = jnp.asarray(nodes / sigma)[:, None, None, None]
        fake = adversarial.generator_loss(lambda *a: -discriminate(*a), zero, noise, level, None)[0]
        both = adversarial.discriminator_loss(discriminate, zero, zero, noise, noise, level, level, None, None)[0]
        return jnp.sum(p * fake + q * (both - fake))

    np.testing.assert_allclose(jax.grad(mean)(jnp.zeros(3)), 0.0, atol=1e-10)
    assert jnp.linalg.norm(jax.grad(mean)(jnp.asarray([0.3, 0.0, 0.0]))) > 1e-2


def test_sida_is_the_published_sum():
    """0.5 * 100 SiD + 0.5 * 0.01 CHW BCE / normaliser, over 100."""
    x0, noise, level = inputs()
    networks = nets()._replace(discriminate=lambda *args: 6 * nets().discriminate(*args))  # some beyond the clamp

    def published(x0):
        by_scores, metrics = sid.pair_loss(networks, x0, noise, level, None, alpha=1.0)
        scores = logits(networks.discriminate, diffuse(x0, noise, level), level, None)
        bce = jnp.mean(-jnp.log(jax.nn.sigmoid(jnp.clip(scores, -10, 10))), axis=1)
        return (0.5 * 100 * by_scores + 0.5 * 0.01 * 32 * bce * metrics["weight"]) / 100

    loss, metrics = sida.pair_loss(networks, x0, noise, level, None)
    np.testing.assert_allclose(loss, published(x0), rtol=1e-5, atol=1e-7)
    ours = jax.grad(lambda x: jnp.sum(sida.pair_loss(networks, x, noise, level, None)[0]))(x0)
    np.testing.assert_allclose(ours, jax.grad(lambda x: jnp.sum(published(x)))(x0), rtol=1e-4, atol=1e-6)
    assert {"divergence", "fake_logit", "score_divergence"} <= set(metrics)
    none = sida.pair_loss(networks, x0, noise, level, None, adversarial_weight=0.0)[0]
    np.testing.assert_array_equal(none, 0.5 * sid.pair_loss(networks, x0, noise, level, None, alpha=1.0)[0])
    assert not np.allclose(loss, none, rtol=1e-6)
