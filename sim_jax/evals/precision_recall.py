"""Precision, recall, density and coverage of generated features against real ones, by nearest neighbours.

With B_k(x) the closed ball around x that reaches to its k-th nearest other point of its own set:

    precision = share of generated points inside some B_k(real),     Kynkaanniemi et al. 2019, eqs. 1-2,
    recall    = share of real points inside some B_k(generated),     https://arxiv.org/abs/1904.06991 (k = 3);
    density   = 1/(k M) sum_j #{i : generated_j in B_k(real_i)},     Naeem et al. 2020, eqs. 3-4,
    coverage  = share of the B_k(real) that hold a generated point,  https://arxiv.org/abs/2002.09797 (k = 5).

All four depend on the numbers of points: compare only what was measured at equal counts.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_BLOCK_ELEMENTS = 2**22   # distances held at once: 32 MiB of float64


def precision_recall(real: np.ndarray, generated: np.ndarray, *, k: int = 3,
                     density_k: int = 5) -> dict[str, float]:
    """Precision and recall (balls of `k` neighbours), density and coverage (of `density_k`).

    Args:
      real: features [N,F], N > max(k, density_k).
      generated: features [M,F], M > k.
    Returns:
      {"precision", "recall", "density", "coverage"}: in [0, 1], but density is about 1 for equal laws.
    Raises:
      ValueError: on k < 1, too few points, shapes that do not fit, or numbers that are not finite.
    """
    for name, value in (("k", k), ("density_k", density_k)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, allowed: 1 or more")
    real = _check("real", real, more_than=max(k, density_k))
    generated = _check("generated", generated, more_than=k)
    if real.shape[1] != generated.shape[1]:
        raise ValueError(f"generated: got {generated.shape[1]} features, allowed: {real.shape[1]} as in real")
    # Distances come from |a|^2 + |b|^2 - 2ab, which cancels least near the origin.
    centre = real.mean(axis=0)[None, :]
    real -= centre
    generated -= centre
    real_radii, density_radii = _squared_radii(real, (k, density_k))
    (generated_radii,) = _squared_radii(generated, (k,))
    precise, inside = 0, 0
    recalled, covered = np.zeros(len(real), bool), np.zeros(len(real), bool)
    for rows, distances in _blocks(generated, real):
        precise += int((distances <= real_radii[None, :]).any(axis=1).sum())
        recalled |= (distances <= generated_radii[rows, None]).any(axis=0)
        held = distances <= density_radii[None, :]
        inside += int(held.sum())
        covered |= held.any(axis=0)
    return {"precision": precise / len(generated), "recall": float(recalled.mean()),
            "density": inside / (density_k * len(generated)), "coverage": float(covered.mean())}


def _check(name: str, features: np.ndarray, *, more_than: int) -> np.ndarray:
    features = np.array(features, np.float64)   # a copy, to be centred in place
    if features.ndim != 2 or len(features) <= more_than:
        raise ValueError(f"{name}: got shape {features.shape}, allowed: [N,F] with N > {more_than}")
    if not np.isfinite(features).all():
        raise ValueError(f"{name}: got NaN or infinity, allowed: finite numbers")
    return features


def _squared_radii(points: np.ndarray, ks: tuple[int, ...]) -> np.ndarray:
    """Squared distance of each of points [N,F] to its k-th nearest other point -> [len(ks),N]."""
    radii = np.empty((len(ks), len(points)))
    for rows, distances in _blocks(points, points):
        # A point is not its own neighbour.
        distances[np.arange(len(distances)), np.arange(rows.start, rows.stop)] = np.inf
        nearest = np.partition(distances, sorted({k - 1 for k in ks}), axis=1)
        radii[:, rows] = np.stack([nearest[:, k - 1] for k in ks])
    return radii


def _blocks(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """(rows, squared distances [rows,len(b)]) of consecutive blocks of a's rows to all of b."""
    norms_a, norms_b = np.sum(a**2, axis=1), np.sum(b**2, axis=1)
    step = max(1, _BLOCK_ELEMENTS // len(b))
    for start in range(0, len(a), step):
        rows = slice(start, min(start + step, len(a)))
        distances = norms_a[rows, None] + norms_b[None, :] - 2.0 * (a[rows] @ b.T)
        yield rows, np.maximum(distances, 0.0, out=distances)
