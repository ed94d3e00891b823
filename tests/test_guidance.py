"""Guidance: the formula by hand, w = 1 for free, the interval, null labels."""

import jax.numpy as jnp
import numpy as np
import pytest

from sim_jax.diffusion import guidance
from sim_jax.types import Cond

X = jnp.asarray([0.5, -1.0, 2.0])[:, None, None, None] * jnp.ones((3, 2, 2, 1))
SIGMA = jnp.asarray([0.1, 1.0, 10.0])
COND = Cond(class_labels=jnp.asarray([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), augment_labels=jnp.ones((3, 4)))


def labelled(x, sigma, cond):
    """x - 1 plus 2 (class 0) or 3 (class 1), plus the noise level and the first augmentation label."""
    shift = jnp.sum(cond.class_labels * jnp.asarray([[2.0, 3.0]]), axis=1) - 1
    shift = shift + sigma + cond.augment_labels[:, 0]
    return x + shift[:, None, None, None]


def expected(w):
    shift = -1 + jnp.asarray(w) * jnp.asarray([2.0, 3.0, 2.0]) + SIGMA + 1
    return X + shift[:, None, None, None]


def test_formula_by_hand():
    for w in (3.0, 0.0, -0.5):
        out = guidance.classifier_free(labelled, w=w)(X, SIGMA, COND)
        np.testing.assert_allclose(out, expected([w, w, w]), rtol=1e-6, atol=1e-6)


def test_weight_one_is_the_same_function():
    assert guidance.classifier_free(labelled, w=1.0) is labelled
    assert guidance.classifier_free(labelled, w=1, interval=(0.1, 2.0)) is labelled
    assert guidance.autoguidance(labelled, None, w=1.0) is labelled


def test_interval_is_open_below_and_closed_above():
    for interval, w in [((0.1, 1.0), [1, 3, 1]), ((0.05, 10.0), [3, 3, 3]), ((1.0, 5.0), [1, 1, 1])]:
        out = guidance.classifier_free(labelled, w=3.0, interval=interval)(X, SIGMA, COND)
        np.testing.assert_allclose(out, expected(w), rtol=1e-6, err_msg=str(interval))
    outside = guidance.classifier_free(labelled, w=3.0, interval=(1.0, 5.0))(X, SIGMA, COND)
    np.testing.assert_array_equal(outside, labelled(X, SIGMA, COND))


def test_autoguidance_is_the_same_formula_with_another_network():
    out = guidance.autoguidance(lambda x, s, c: 2 * x, lambda x, s, c: 3 * x, w=1.5)(X, SIGMA, COND)
    np.testing.assert_allclose(out, 1.5 * X, rtol=1e-6)  # 3 x + 1.5 (2 x - 3 x)


def test_guided_gaussian_score_is_the_tilted_one():
    # D_c for N(m, v), D_u for N(0, v): the guided D belongs to N(w m, v), as D is linear in the mean
    v, m, w = 0.25, 0.8, 2.5
    s2 = (SIGMA**2)[:, None, None, None]

    def denoise(x, sigma, cond):
        mean = m * jnp.sum(cond.class_labels, axis=1)[:, None, None, None]
        return mean + v / (v + s2) * (x - mean)

    out = guidance.classifier_free(denoise, w=w)(X, SIGMA, COND)
    np.testing.assert_allclose(out, w * m + v / (v + s2) * (X - w * m), rtol=1e-5)


def test_bad_input():
    with pytest.raises(ValueError, match="w: got nan, allowed"):
        guidance.classifier_free(labelled, w=float("nan"))
    with pytest.raises(ValueError, match=r"interval: got \(2.0, 1.0\), allowed"):
        guidance.classifier_free(labelled, w=2.0, interval=(2.0, 1.0))
    with pytest.raises(ValueError, match="class_labels: got None, allowed"):
        guidance.classifier_free(lambda x, s, c: x, w=2.0)(X, SIGMA, Cond())
