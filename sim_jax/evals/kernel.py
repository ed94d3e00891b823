"""Kernel distance (KID on Inception features): the squared maximum mean discrepancy of a cubic kernel, estimated without bias.

Binkowski et al. 2018 (https://arxiv.org/abs/1801.01401), eq. 4 and section 4, for features x_i of one set and y_j of the other:

    k(x, y) = (<x, y> / F + 1)^3,
    MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j).

Its expectation does not depend on the numbers of images, and is zero for equal laws, so that single values may be negative. What
is reported is the mean and the spread over random subsets, drawn without replacement, 100 of 1000 images unless there are fewer.
"""

from __future__ import annotations

import numpy as np

_BLOCK = 4096   # rows of a kernel matrix that are held at once


def mmd2(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimate for features x [N,F] and y [M,F], N and M >= 2; memory is a block of 4096 rows."""
    within = [(_kernel_sum(a, a) - _diagonal_sum(a)) / (len(a) * (len(a) - 1)) for a in (x, y)]
    return float(sum(within) - 2.0 * _kernel_sum(x, y) / (len(x) * len(y)))


def kernel_distance(real: np.ndarray, generated: np.ndarray, *, subsets: int = 100, subset_size: int = 1000,
                    seed: int = 0) -> dict[str, float]:
    """Mean and standard deviation of `mmd2` over subsets.

    Args:
      real: features [M,F].
      generated: features [N,F].
      subset_size: images of each set in a subset; where there are fewer, all of the smaller set.
      seed: of the subsets.
    Returns: {"kd", "kd_std", "kd_subset_size"}.
    Raises: ValueError for fewer than 2 images, shapes that do not fit, numbers that are not finite, subsets < 1.
    """
    for name, points in (("real", real), ("generated", generated)):
        if points.ndim != 2 or len(points) < 2 or points.shape[1] != real.shape[1]:
            raise ValueError(f"{name}: got shape {points.shape}, allowed: [N,{real.shape[-1]}] with N >= 2")
        if not np.isfinite(points).all():
            raise ValueError(f"{name}: got NaN or infinity, allowed: finite numbers")
    if subsets < 1 or subset_size < 2:
        raise ValueError(f"subsets: got {subsets} of {subset_size} images, allowed: 1 or more of 2 or more")
    size = min(subset_size, len(real), len(generated))
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        x, y = (points[generator.choice(len(points), size, replace=False)].astype(np.float64) for points in (generated, real))
        values.append(mmd2(x, y))
    return {"kd": float(np.mean(values)), "kd_std": float(np.std(values)), "kd_subset_size": size}


def _kernel_sum(x: np.ndarray, y: np.ndarray) -> float:
    return sum(float(np.sum((x[start:start + _BLOCK] @ y.T / x.shape[1] + 1.0) ** 3)) for start in range(0, len(x), _BLOCK))


def _diagonal_sum(x: np.ndarray) -> float:
    return float(np.sum((np.sum(x * x, axis=1) / x.shape[1] + 1.0) ** 3))
