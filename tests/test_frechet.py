"""Frechet distance against closed forms; streamed statistics against numpy."""

import numpy as np
import pytest
import scipy.linalg

from sim_jax.evals import frechet


def _spd(rng, dim, *, floor=0.1):
    a = rng.standard_normal((dim, dim))
    return a @ a.T / dim + floor * np.eye(dim)


def _rotation(rng, dim):
    return np.linalg.qr(rng.standard_normal((dim, dim)))[0]


def test_diagonal_gaussians_in_closed_form():
    rng = np.random.default_rng(0)
    m1, m2 = rng.standard_normal((2, 12))
    v1, v2 = rng.uniform(0.0, 3.0, (2, 12))
    expected = np.sum((m1 - m2) ** 2) + np.sum((np.sqrt(v1) - np.sqrt(v2)) ** 2)
    assert frechet.frechet_distance(m1, np.diag(v1), m2, np.diag(v2)) == pytest.approx(expected, rel=1e-12)


def test_hand_computed_in_one_dimension():
    # (3 - 1)^2 + (2 - 5)^2
    assert frechet.frechet_distance([3.0], [[4.0]], [1.0], [[25.0]]) == pytest.approx(13.0, rel=1e-12)


def test_a_common_rotation_and_shift_change_nothing():
    rng = np.random.default_rng(1)
    m1, m2, shift = rng.standard_normal((3, 9))
    s1, s2, q = _spd(rng, 9), _spd(rng, 9), _rotation(rng, 9)
    straight = frechet.frechet_distance(m1, s1, m2, s2)
    turned = frechet.frechet_distance(q @ m1 + shift, q @ s1 @ q.T, q @ m2 + shift, q @ s2 @ q.T)
    assert turned == pytest.approx(straight, rel=1e-11)


def test_covariances_that_do_not_commute():
    # In two dimensions tr sqrt(AB) = sqrt(tr AB + 2 sqrt det AB).
    a, b = np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([[4.0, -1.5], [-1.5, 1.0]])
    cross = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a) * np.linalg.det(b)))
    expected = np.trace(a) + np.trace(b) - 2 * cross
    assert frechet.frechet_distance([0.0, 0.0], a, [0.0, 0.0], b) == pytest.approx(expected, rel=1e-12)


def test_agrees_with_the_general_matrix_root_and_is_symmetric():
    rng = np.random.default_rng(2)
    s1, s2 = _spd(rng, 24), _spd(rng, 24)
    m1, m2 = rng.standard_normal((2, 24))
    expected = np.sum((m1 - m2) ** 2) + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
    forth = frechet.frechet_distance(m1, s1, m2, s2)
    assert forth == pytest.approx(expected, rel=1e-9)
    assert frechet.frechet_distance(m2, s2, m1, s1) == pytest.approx(forth, rel=1e-12)


@pytest.mark.parametrize("rank", [0, 1, 5, 20])
def test_equal_gaussians_are_at_distance_zero_even_when_singular(rank):
    rng = np.random.default_rng(3)
    a = rng.standard_normal((20, rank))
    sigma = a @ a.T
    distance = frechet.frechet_distance(np.ones(20), sigma, np.ones(20), sigma)
    assert 0.0 <= distance <= 1e-12 * max(np.trace(sigma), 1.0)


def test_rank_one_covariances_in_closed_form():
    # tr sqrt(S1^{1/2} S2 S1^{1/2}) = |u . v| for S1 = u u^T, S2 = v v^T.
    rng = np.random.default_rng(4)
    u, v = rng.standard_normal((2, 30))
    distance = frechet.frechet_distance(np.zeros(30), np.outer(u, u), np.zeros(30), np.outer(v, v))
    assert distance == pytest.approx(u @ u + v @ v - 2 * abs(u @ v), rel=1e-10)


def test_a_point_mass():
    rng = np.random.default_rng(5)
    sigma, mu = _spd(rng, 7), rng.standard_normal(7)
    distance = frechet.frechet_distance(mu, sigma, np.zeros(7), np.zeros((7, 7)))
    assert distance == pytest.approx(mu @ mu + np.trace(sigma), rel=1e-12)


def test_fewer_samples_than_dimensions():
    # With centred data X = [n,F], S = X^T X / (n - 1): the trace of the root is the nuclear norm of X1 X2^T.
    rng = np.random.default_rng(6)
    x1, x2 = rng.standard_normal((6, 50)), rng.standard_normal((9, 50)) + 0.5
    c1, c2 = x1 - x1.mean(0)[None], x2 - x2.mean(0)[None]
    nuclear = np.linalg.svd(c1 @ c2.T, compute_uv=False).sum() / np.sqrt(5 * 8)
    expected = (np.sum((x1.mean(0) - x2.mean(0)) ** 2) + np.sum(c1**2) / 5 + np.sum(c2**2) / 8 - 2 * nuclear)
    got = frechet.statistics_distance(frechet.feature_statistics(x1), frechet.feature_statistics(x2))
    assert got == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("sizes", [[100], [1] * 100, [1, 99], [50, 0, 50], [7, 30, 63]])
def test_streaming_equals_numpy_for_any_chunking(sizes):
    x = np.random.default_rng(7).standard_normal((100, 8)) * np.arange(1, 9)[None] + 3.0
    statistics = frechet.stream_statistics(np.split(x, np.cumsum(sizes)[:-1]))
    mean, covariance = frechet.mean_and_covariance(statistics)
    assert statistics.count == 100
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(x.T), rtol=1e-10, atol=1e-10)


def test_merging_does_not_depend_on_order():
    rng = np.random.default_rng(8)
    a, b, c = (frechet.feature_statistics(rng.standard_normal((n, 5)) + n) for n in (3, 40, 11))
    left = frechet.merge_statistics(frechet.merge_statistics(a, b), c)
    right = frechet.merge_statistics(c, frechet.merge_statistics(b, a))
    assert left.count == right.count == 54
    np.testing.assert_allclose(left.mean, right.mean, rtol=1e-12)
    np.testing.assert_allclose(left.scatter, right.scatter, rtol=1e-12)


def test_a_large_mean_costs_no_digits():
    # The naive sum of squares would lose all of them: 1e8^2 against a variance of 1.
    x = np.random.default_rng(9).standard_normal((1000, 4))
    far = frechet.stream_statistics(np.array_split(x + 1e8, 13))
    np.testing.assert_allclose(frechet.mean_and_covariance(far)[1], np.cov(x.T), rtol=1e-6, atol=1e-7)


def test_float32_features_are_summed_in_float64():
    x = np.random.default_rng(10).standard_normal((3000, 3)).astype(np.float32) + np.float32(100)
    statistics = frechet.feature_statistics(x)
    assert statistics.scatter.dtype == np.float64
    expected = np.cov(x.astype(np.float64).T)
    np.testing.assert_allclose(statistics.scatter / 2999, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("arguments, message", [
    (([0.0], [[1.0]], [0.0, 0.0], np.eye(2)), "mu2: got shape"),
    (([0.0, 0.0], np.eye(3), [0.0, 0.0], np.eye(2)), "sigma1: got shape"),
    (([0.0, 0.0], np.eye(2), [0.0, np.nan], np.eye(2)), "sigma2: got NaN"),
    (([0.0, 0.0], [[1.0, 0.5], [0.0, 1.0]], [0.0, 0.0], np.eye(2)), "not symmetric"),
    (([0.0, 0.0], np.diag([1.0, -1.0]), [0.0, 0.0], np.eye(2)), "eigenvalue"),
])
def test_what_is_no_gaussian_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        frechet.frechet_distance(*arguments)


def test_statistics_refuse_what_they_cannot_use():
    good = frechet.feature_statistics(np.zeros((1, 2)))
    with pytest.raises(ValueError, match="2 or more"):
        frechet.mean_and_covariance(good)
    with pytest.raises(ValueError, match="1 of 3 rows"):
        frechet.feature_statistics(np.array([[0.0], [np.inf], [1.0]]))
    with pytest.raises(ValueError, match="no samples"):
        frechet.stream_statistics([np.zeros((0, 2))])
    with pytest.raises(ValueError, match="dimensions 2 and 3"):
        frechet.merge_statistics(good, frechet.feature_statistics(np.zeros((1, 3))))
    with pytest.raises(ValueError, match=r"\[N,F\]"):
        frechet.feature_statistics(np.zeros(4))


def test_a_gaussian_is_factored_once_and_gives_the_same(monkeypatch):
    rng = np.random.default_rng(11)
    a, b = (frechet.gaussian(frechet.feature_statistics(rng.standard_normal((n, 8)) * s)) for n, s in ((40, 1.0), (5, 2.0)))
    expected = frechet.frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    np.testing.assert_allclose(np.sort(a.eigenvalues), np.linalg.eigvalsh(a.covariance), rtol=1e-10)
    assert len(b.eigenvalues) == 4 and b.count == 5        # 5 samples span 4 dimensions about their mean
    assert frechet.distance(a, b) == expected
    monkeypatch.setattr(np.linalg, "eigh", None)
    assert frechet.distance(a, b) == expected
