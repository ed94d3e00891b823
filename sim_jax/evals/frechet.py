"""Frechet distance between Gaussians fitted to two sets of features, in float64.

Heusel et al. 2017 (https://arxiv.org/abs/1706.08500), eq. 6; Dowson and Landau 1982:

    d^2(N(m1, S1), N(m2, S2)) = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1^{1/2} S2 S1^{1/2})^{1/2}.

With S_i = A_i A_i^T the last trace is the nuclear norm (sum of singular values) of A_1^T A_2, where A_i comes
from the eigendecomposition of the symmetric S_i. No general matrix root is taken, so nothing turns complex,
and a singular S_i (fewer samples than dimensions) merely gives A_i fewer columns.

Statistics are streamed by Chan, Golub and LeVeque 1983 (https://doi.org/10.1080/00031305.1983.10483115):
count, mean and scatter about that mean, M = sum (f - m)(f - m)^T, merge as

    m = m_a + delta n_b / n,   M = M_a + M_b + delta delta^T n_a n_b / n,  delta = m_b - m_a,  n = n_a + n_b.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class GaussianStatistics(NamedTuple):
    """count: samples; mean: [F] float64; scatter: [F,F] float64, the sum of outer products about the mean."""

    count: int
    mean: np.ndarray
    scatter: np.ndarray


@dataclass(frozen=True, eq=False)
class Gaussian:
    """mean [F], covariance [F,F] (N - 1), both float64; count N, or None where a file does not say.

    What takes long at 2048 features, the eigendecomposition, is done once: a reference is compared with many sets.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None = None

    @functools.cached_property
    def factor(self) -> np.ndarray:
        """A [F,rank] with orthogonal columns, A A^T = covariance; ValueError where that is no covariance."""
        return _factor("covariance", self.covariance, self.mean)

    @property
    def eigenvalues(self) -> np.ndarray:
        """Those of the covariance that are not zero, [rank]."""
        return np.sum(self.factor**2, axis=0)


def feature_statistics(features: np.ndarray) -> GaussianStatistics:
    """Statistics of features [N,F], N >= 1. Raises ValueError on another shape, and on NaN or infinity."""
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or not features.shape[0]:
        raise ValueError(f"features: got shape {features.shape}, allowed: [N,F] with N >= 1")
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        raise ValueError(f"features: got {(~finite).sum()} of {len(finite)} rows with NaN or infinity, "
                         "allowed: finite numbers")
    mean = features.mean(axis=0)
    centred = features - mean[None, :]
    return GaussianStatistics(len(features), mean, centred.T @ centred)


def merge_statistics(a: GaussianStatistics, b: GaussianStatistics) -> GaussianStatistics:
    """Statistics of the union of two disjoint sets. Raises ValueError where the dimensions differ."""
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"statistics: got dimensions {a.mean.size} and {b.mean.size}, allowed: equal ones")
    count = a.count + b.count
    delta = b.mean - a.mean
    mean = a.mean + delta * (b.count / count)
    scatter = a.scatter + b.scatter + np.outer(delta, delta) * (a.count * b.count / count)
    return GaussianStatistics(count, mean, scatter)


def stream_statistics(chunks: Iterable[np.ndarray]) -> GaussianStatistics:
    """Statistics of features that come in chunks [n_i,F], of which empty ones are skipped.

    Memory is one chunk and [F,F]. Raises ValueError where nothing came.
    """
    total = None
    for chunk in chunks:
        if len(chunk):
            part = feature_statistics(chunk)
            total = part if total is None else merge_statistics(total, part)
    if total is None:
        raise ValueError("features: got no samples, allowed: one or more")
    return total


def mean_and_covariance(statistics: GaussianStatistics) -> tuple[np.ndarray, np.ndarray]:
    """(mean [F], unbiased covariance [F,F] with N - 1, as in EDM's references). ValueError where N < 2."""
    if statistics.count < 2:
        raise ValueError(f"samples: got {statistics.count}, allowed: 2 or more for a covariance")
    return statistics.mean, statistics.scatter / (statistics.count - 1)


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians: what is called FID on Inception features.

    Args:
      mu1, mu2: means [F].
      sigma1, sigma2: covariances [F,F], symmetric positive semi-definite up to rounding.
    Returns:
      The distance, >= 0, in squared feature units.
    Raises:
      ValueError: where shapes disagree, an entry is not finite, or a sigma is no covariance.
    """
    mu1, mu2 = np.asarray(mu1, np.float64), np.asarray(mu2, np.float64)
    return _distance(mu1, _factor("sigma1", sigma1, mu1), mu2, _factor("sigma2", sigma2, mu2))


def distance(a: Gaussian, b: Gaussian) -> float:
    """`frechet_distance` of two Gaussians, each of which is factored once."""
    return _distance(a.mean, a.factor, b.mean, b.factor)


def gaussian(statistics: GaussianStatistics) -> Gaussian:
    """Mean and covariance of streamed statistics, of two samples or more."""
    return Gaussian(*mean_and_covariance(statistics), statistics.count)


def _distance(mu1: np.ndarray, factor1: np.ndarray, mu2: np.ndarray, factor2: np.ndarray) -> float:
    if mu1.shape != mu2.shape:
        raise ValueError(f"mu2: got shape {mu2.shape}, allowed: {mu1.shape}, that of mu1")
    product = factor1.T @ factor2
    cross = np.linalg.svd(product, compute_uv=False).sum() if product.size else 0.0
    squared = np.sum((mu1 - mu2) ** 2) + np.sum(factor1**2) + np.sum(factor2**2) - 2.0 * cross
    # Of equal Gaussians the four terms cancel to rounding, which may fall on either side of zero.
    return float(max(squared, 0.0))


def statistics_distance(a: GaussianStatistics, b: GaussianStatistics) -> float:
    """`frechet_distance` of two streamed statistics, each of two samples or more."""
    return frechet_distance(*mean_and_covariance(a), *mean_and_covariance(b))


def _factor(name: str, sigma: np.ndarray, mu: np.ndarray) -> np.ndarray:
    """A [F,r] with A A^T = sigma, r its numerical rank."""
    sigma = np.asarray(sigma, np.float64)
    if mu.ndim != 1 or not mu.size or sigma.shape != (mu.size, mu.size):
        raise ValueError(f"{name}: got shape {sigma.shape} beside a mean {mu.shape}, allowed: [F,F] and [F]")
    if not (np.isfinite(sigma).all() and np.isfinite(mu).all()):
        raise ValueError(f"{name}: got NaN or infinity in it or its mean, allowed: finite numbers")
    scale = np.abs(sigma).max()
    if np.abs(sigma - sigma.T).max() > 1e-6 * scale:
        raise ValueError(f"{name}: got a matrix that is not symmetric, allowed: a covariance")
    eigenvalues, vectors = np.linalg.eigh(0.5 * (sigma + sigma.T))
    if eigenvalues[0] < -1e-6 * scale:
        raise ValueError(f"{name}: got an eigenvalue {eigenvalues[0]:.3g}, allowed: a covariance (>= 0)")
    # Eigenvalues below rounding are noise, and their roots (1e-16 -> 1e-8) would no longer be small.
    keep = eigenvalues > mu.size * np.finfo(np.float64).eps * eigenvalues[-1]
    return vectors[:, keep] * np.sqrt(eigenvalues[keep])[None, :]
