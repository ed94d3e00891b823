"""Figures and pictures of points: closed forms and constructed samples."""

import math

import numpy as np
import pytest

from sim_jax import analytic, views
from sim_jax.evals import points

RNG = np.random.default_rng(0)


def test_sliced_wasserstein_of_a_shift():
    """W1 of a projected shift v is |v . u|; its mean over directions of the plane is 2 |v| / pi."""
    a = RNG.standard_normal((500, 2))
    shifted = points.sliced_wasserstein(a, a + np.array([3.0, 4.0]), projections=4000)
    assert shifted == pytest.approx(5 * 2 / math.pi, rel=0.02)
    assert points.sliced_wasserstein(a, a[::-1]) == 0.0
    assert points.sliced_wasserstein(a, a + 1.0) == points.sliced_wasserstein(a + 1.0, a)


@pytest.mark.parametrize("a, b", [(np.zeros((3, 2)), np.zeros((4, 2))), (np.zeros(3), np.zeros(3)), (np.zeros((0, 2)), np.zeros((0, 2)))])
def test_samples_that_cannot_be_compared(a, b):
    with pytest.raises(ValueError, match="allowed: two of one shape"):
        points.sliced_wasserstein(a, b)


def test_modes_of_constructed_samples():
    """Four modes: two right, one with twice its mass, one whose samples are four standard deviations away."""
    made = analytic.mixture(np.array([[-1.0, -1], [-1, 1], [1, -1], [1, 1]]), 0.1)
    means = made.params["means"]
    at = lambda k, n: means[k] + 0.03 * RNG.standard_normal((n, 2))  # noqa: E731
    samples = np.concatenate([at(0, 250), at(1, 250), at(2, 500), means[3] + np.array([[0.4, 0.0]] * 250)])
    out = points.modes(samples, made.params)
    assert (out["modes"], out["modes_reached"], out["of"]) == (2, 3, 4)
    assert out["high_quality"] == pytest.approx(0.8)
    assert out["mass_error"] == pytest.approx(1.0)


def test_true_samples_reach_all_modes():
    """Also of general covariances, where nearness is measured in each mode's own shape."""
    covariances = np.array([np.diag([0.04, 0.0004]), np.diag([0.0004, 0.04])])
    made = analytic.mixture(np.array([[-2.0, 0], [2.0, 0]]), covariances, weights=[1.0, 3.0])
    k = (RNG.random(20000) < 0.75).astype(int)
    samples = made.params["means"][k] + np.sqrt(np.array([np.diag(c) for c in covariances]))[k] * RNG.standard_normal((20000, 2))
    out = points.modes(samples, made.params)
    assert out["modes"] == 2 and out["mass_error"] < 0.05
    assert out["high_quality"] == pytest.approx(1 - math.exp(-4.5), abs=0.003)


def test_a_cloud_is_dark_where_samples_are():
    picture = views.cloud(np.array([[0.5, 0.5]] * 10), extent=1.0, size=8)
    assert picture.shape == (8, 8, 3) and picture.dtype == np.uint8
    rows, columns = np.nonzero(picture[..., 0] < 255)
    assert set(zip(rows.tolist(), columns.tolist())) == {(1, 6)} or set(zip(rows.tolist(), columns.tolist())) == {(2, 6)}   # up and right
