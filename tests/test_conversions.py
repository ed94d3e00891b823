"""x0, eps, score and v: hand-computed values, round trips, and the limits at sigma -> 0."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sim_jax.diffusion import schedules
from sim_jax.diffusion.conversions import TABLE, convert
from sim_jax.types import NoiseLevel

NAMES = tuple(TABLE)


def test_by_hand():
    # x0 = 2, eps = -1, alpha = 0.6, sigma = 0.8: x_t = 1.2 - 0.8 = 0.4, score = 1 / 0.8, v = -0.6 - 1.6
    level = NoiseLevel(*(jnp.full(1, a, jnp.float32) for a in (0.3, 0.6, 0.8)))
    x_t = jnp.full((1, 1, 1, 1), 0.4)
    values = {"x0": 2.0, "eps": -1.0, "score": 1.25, "v": -2.2}
    for source, target in itertools.product(NAMES, NAMES):
        value = jnp.full_like(x_t, values[source])
        out = convert(value, x_t, level, source=source, target=target)
        np.testing.assert_allclose(out, values[target], rtol=1e-6, err_msg=f"{source} -> {target}")


@pytest.mark.parametrize("source, target", list(itertools.permutations(NAMES, 2)))
@pytest.mark.parametrize("preserving", [True, False])
def test_round_trip_and_forward_process(source, target, preserving):
    keys = jax.random.split(jax.random.key(0), 2)
    x0, eps = (jax.random.normal(key, (6, 4, 4, 3)) for key in keys)
    sigma = jnp.linspace(0.1, 0.95, 6)
    alpha = jnp.sqrt(1 - sigma**2) if preserving else jnp.linspace(0.5, 3.0, 6)
    a, s = alpha[:, None, None, None], sigma[:, None, None, None]
    truth = {"x0": x0, "eps": eps, "score": -eps / s, "v": a * eps - s * x0}
    x_t, level = a * x0 + s * eps, NoiseLevel(sigma, alpha, sigma)
    there = convert(truth[source], x_t, level, source=source, target=target)
    np.testing.assert_allclose(there, truth[target], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(convert(there, x_t, level, source=target, target=source), truth[source],
                               rtol=1e-4, atol=1e-4)


def test_score_is_the_gradient_of_a_gaussians_log_density():
    mu, v = 0.3, 0.25
    level = schedules.get("vp").level(jnp.asarray([0.2, 0.7]))
    a, s = level.alpha[:, None], level.sigma[:, None]
    x_t = jnp.asarray([[0.5, -1.0], [0.2, 2.0]])
    x0 = mu + a * v / (a**2 * v + s**2) * (x_t - a * mu)   # E[x_0 | x_t]
    score = -(x_t - a * mu) / (a**2 * v + s**2)
    np.testing.assert_allclose(convert(x0, x_t, level, source="x0", target="score"), score, rtol=1e-5)


def test_limits_as_documented():
    level = NoiseLevel(*(jnp.full(1, a, jnp.float32) for a in (0.0, 0.5, 0.0)))
    x_t, value = jnp.full((1, 2), 3.0), jnp.full((1, 2), 7.0)
    for source in ("eps", "score", "v"):
        np.testing.assert_array_equal(convert(value, x_t, level, source=source, target="x0"), 6.0)
    for target in ("eps", "score", "v"):
        assert np.isnan(convert(x_t / 0.5, x_t, level, source="x0", target=target)).all()
    blank = NoiseLevel(*(jnp.full(1, a, jnp.float32) for a in (1.0, 0.0, 1.0)))
    np.testing.assert_array_equal(convert(value, x_t, blank, source="v", target="x0"), -7.0)


def test_same_name_is_no_computation():
    x = jnp.ones((1, 2))
    assert convert(x, x, NoiseLevel(*(jnp.zeros(1),) * 3), source="eps", target="eps") is x


@pytest.mark.parametrize("knobs", [{"source": "noise", "target": "x0"}, {"source": "x0", "target": "noise"}])
def test_unknown_name(knobs):
    with pytest.raises(ValueError, match="got 'noise', allowed: x0, eps, score, v"):
        convert(jnp.ones((1, 1)), jnp.ones((1, 1)), NoiseLevel(*(jnp.ones(1),) * 3), **knobs)
