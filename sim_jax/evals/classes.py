"""Class by class: the Frechet distance within each, and whether each comes as often as it should.

Balance compares how many images a classifier puts into each class, n_k of the samples' N and m_k of the reference's M:

    total variation   1/2 sum_k |n_k / N - m_k / M|,
    chi-square        sum_k (sqrt(M/N) n_k - sqrt(N/M) m_k)^2 / (n_k + m_k), of two samples, with K - 1 degrees of freedom for equal laws.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sim_jax.evals import frechet
from sim_jax.evals.frechet import Gaussian


def balance(predicted: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """{"class_tv", "class_chi2", "class_chi2_dof"} of counts [K] and [K]; classes that neither has count for nothing."""
    n, m = np.asarray(predicted, np.float64), np.asarray(reference, np.float64)
    if n.shape != m.shape or not (n.sum() and m.sum()):
        raise ValueError(f"classes: got counts of {n.size} and {m.size} classes, allowed: equally many, not all zero")
    seen = n + m > 0
    n, m, total_n, total_m = n[seen], m[seen], n.sum(), m.sum()
    difference = np.sqrt(total_m / total_n) * n - np.sqrt(total_n / total_m) * m
    return {"class_tv": float(0.5 * np.abs(n / total_n - m / total_m).sum()), "class_chi2": float((difference**2 / (n + m)).sum()),
            "class_chi2_dof": int(seen.sum()) - 1}


def class_distances(samples: Mapping[int, Gaussian], reference: Mapping[int, Gaussian]) -> tuple[dict[str, float], dict[int, float]]:
    """Frechet distances within classes.

    Returns: ({"class_fd": mean over the classes that both have, "class_fd_max", "class_fd_worst": its class, "class_fd_missing": classes
      of the reference without samples}, {class: distance}).
    Raises: ValueError where no class has 2 images on both sides.
    """
    both = [label for label in reference if label in samples]
    each = {label: frechet.distance(samples[label], reference[label]) for label in both}
    if not each:
        raise ValueError("class_fd: got no class with 2 images or more on both sides, allowed: one or more")
    worst = max(each, key=each.get)
    return {"class_fd": float(np.mean(list(each.values()))), "class_fd_max": each[worst], "class_fd_worst": worst,
            "class_fd_missing": len(reference) - len(each)}, each
