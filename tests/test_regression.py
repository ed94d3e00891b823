"""The regression term's distances by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sim_jax.objectives import distances
from sim_jax.objectives.regression import check, regression_loss


def images(seed=0, batch=3):
    return jax.random.normal(jax.random.key(seed), (2, batch, 4, 4, 2), jnp.float32)


def maps(x):
    """Two maps of different size, the first with a dead position."""
    return [x.at[:, 0, 0].set(0.0), jnp.concatenate([x[:, ::2, ::2], 2 * x[:, 1::2, 1::2]], axis=-1)]


@pytest.mark.parametrize("distance,knobs", [("squared_l2", {}), ("pseudo_huber", dict(c=0.5)), ("power", dict(p=1.5))])
def test_distances_are_those_of_the_table(distance, knobs):
    x0, y = images()
    expected = distances.get(distance, **knobs).value(x0 - y)
    np.testing.assert_allclose(regression_loss(x0, y, distance=distance, **knobs)[0], expected / 32, rtol=1e-6)
    np.testing.assert_allclose(regression_loss(x0, y, distance=distance, reduction="sum", **knobs)[0], expected, rtol=1e-6)


def test_default_is_the_mean_squared_error():
    x0, y = images()
    loss, metrics = regression_loss(x0, y)
    np.testing.assert_allclose(loss, np.mean((x0 - y) ** 2, axis=(1, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(metrics["regression_error"], loss, rtol=1e-6)


def test_features_by_hand():
    """One position, two channels: (3, 4) / 5 against (1, 0)."""
    x0, y = jnp.asarray([3.0, 4.0]).reshape(1, 1, 1, 2), jnp.asarray([7.0, 0.0]).reshape(1, 1, 1, 2)
    expected = (0.6 - 1.0) ** 2 + 0.8**2
    np.testing.assert_allclose(regression_loss(x0, y, distance="features", features=lambda x: [x])[0], [expected], rtol=1e-6)
    both = regression_loss(x0, y, distance="features", features=lambda x: [x, jnp.ones((1, 2, 2, 3))])[0]
    np.testing.assert_allclose(both, [expected / 2], rtol=1e-6)


def test_features_against_loops():
    x0, y = images()
    expected = np.zeros(3)
    for a, b in zip(maps(x0), maps(y)):
        for i, row in np.ndindex(a.shape[1:3]):
            u, v = (np.asarray(m[:, i, row], np.float64) for m in (a, b))
            norms = [np.maximum(np.linalg.norm(w, axis=1, keepdims=True), 1e-30) for w in (u, v)]
            expected += ((u / norms[0] - v / norms[1]) ** 2).sum(axis=1) / (a.shape[1] * a.shape[2]) / 2
    np.testing.assert_allclose(regression_loss(x0, y, distance="features", features=maps)[0], expected, rtol=1e-5)


@pytest.mark.parametrize("distance", ["squared_l2", "pseudo_huber", "l2", "features"])
def test_descends_to_the_target_and_rests_there(distance):
    x0, y = images()

    def total(x0, y):
        return jnp.sum(regression_loss(x0, y, distance=distance, features=maps)[0])

    by_x0, by_target = jax.grad(total, argnums=(0, 1))(x0, y)
    assert bool(jnp.isfinite(by_x0).all()) and not by_target.any()
    assert total(x0 - 1e-2 * by_x0, y) < total(x0, y)
    np.testing.assert_allclose(jax.grad(total)(y, y), 0.0, atol=1e-5)
    assert abs(float(total(y, y))) < 1e-6


@pytest.mark.parametrize("knobs,words", [
    (dict(distance="lpips"), ["distance: got 'lpips'", "squared_l2", "features"]),
    (dict(distance="feature"), ["did you mean 'features'"]),
    (dict(distance="features", c=0.1), ["distance 'features'", "'c'", "none"]),
    (dict(distance="squared_l2", c=0.1), ["distance 'squared_l2'", "'c'"]),
    (dict(distance="pseudo_huber", c=-1.0), ["c: got -1.0"]),
    (dict(distance="squared_l2", reduction="max"), ["reduction: got 'max'", "sum, mean"]),
])
def test_bad_input_is_one_clear_line(knobs, words):
    for refuse in (lambda: check(**knobs), lambda: regression_loss(*images(), **knobs)):
        with pytest.raises(ValueError) as error:
            refuse()
        message = str(error.value)
        assert "\n" not in message and "allowed" in message
        for word in words:
            assert word in message


def test_features_must_be_there():
    with pytest.raises(ValueError, match="features: got None, allowed"):
        regression_loss(*images(), distance="features")
