"""Figures of samples in R^D from a mixture of Gaussians that is known exactly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sim_jax.models import gaussian_mixture

_NEAR = 3.0  # standard deviations from a mode's centre, the usual meaning of a sample "of high quality" (1.1% of a 2-D mode lie outside)


def sliced_wasserstein(a: np.ndarray, b: np.ndarray, *, projections: int = 256, seed: int = 0) -> float:
    """The mean over random directions of the 1-D Wasserstein-1 distance of the projected samples (Bonneel et al. 2015, order 1).

    Args:
      a, b: [N,D], equally many.
      projections: directions, uniform on the sphere.
    Raises: ValueError for samples that cannot be compared.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or a.ndim != 2 or not len(a):
        raise ValueError(f"samples: got {a.shape} and {b.shape}, allowed: two of one shape [N,D], N >= 1")
    directions = np.random.default_rng(seed).standard_normal((projections, a.shape[1]))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return float(np.mean(np.abs(np.sort(a @ directions.T, axis=0) - np.sort(b @ directions.T, axis=0))))


def modes(samples: np.ndarray, params: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Which modes of the mixture the samples reach.

    Args:
      samples: [N,D].
      params: of `models.gaussian_mixture`.
    Returns:
      `modes`: how many have a mass within 20% of their own; `modes_reached`: how many have any sample within 3 standard deviations of
      their centre; `of`: how many there are; `mass_error`: the largest |mass / own mass - 1|; `high_quality`: the share of samples that
      are near a centre. Masses are shares of the samples near a centre, so that those between the modes count in `high_quality` alone.
    """
    samples, means = np.asarray(samples, np.float64), np.asarray(params["means"], np.float64)
    index = np.asarray(gaussian_mixture.nearest(params, samples.astype(np.float32)))
    own = np.exp(np.asarray(params["log_weights"], np.float64))
    near = _distances(samples, index, params) < _NEAR
    mass = np.bincount(index[near], minlength=len(means)) / max(near.sum(), 1)
    error = np.abs(mass / (own / own.sum()) - 1)
    return {"modes": int(np.sum(error <= 0.2)), "modes_reached": int(np.sum(mass > 0)), "of": len(means), "mass_error": float(error.max()),
            "high_quality": float(near.mean())}


def _distances(samples: np.ndarray, index: np.ndarray, params: Mapping[str, np.ndarray]) -> np.ndarray:
    """Mahalanobis distance of each sample to the centre of its mode."""
    away = samples - np.asarray(params["means"], np.float64)[index]
    variance = np.square(np.asarray(params["std"], np.float64))[index]
    if "axes" not in params:
        return np.sqrt(np.sum(np.square(away), 1) / variance)
    axes, scales = (np.asarray(params[name], np.float64)[index] for name in ("axes", "scales"))
    along = np.einsum("nd,nrd->nr", away, axes)
    rest = np.sum(np.square(away), 1) - np.sum(np.square(along), 1)
    total = np.square(scales) + variance[:, None]
    full = axes.shape[1] == samples.shape[1]
    return np.sqrt(np.sum(np.square(along) / total, 1) + (0 if full else rest / variance))
