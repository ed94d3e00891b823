"""What finite numbers of images do to a Frechet distance, which they always make too large.

For n and m samples of one Gaussian law with covariance eigenvalues l_i, to first order in 1/n and 1/m,

    E d^2 = (1/n + 1/m) (sum_i l_i + 1/2 sum_ij (1 + delta_ij) l_i l_j / (l_i + l_j)) :

the first sum is the means' part; the second is the Bures distance 1/2 sum_ij E_ij^2 / (l_i + l_j) of covariances that differ by E,
with E E_ij^2 = (1/n + 1/m) (1 + delta_ij) l_i l_j. It holds where n and m are much larger than the dimension.

Chong and Forsyth 2020 (https://arxiv.org/abs/1911.07023): as d^2 is linear in 1/n, the value for infinitely many samples is the
intercept of a line through the distances of subsets of several sizes (their 15, from N / 10 to N, evenly spaced).
"""

from __future__ import annotations

import numpy as np

from sim_jax.evals import frechet
from sim_jax.evals.frechet import Gaussian


def expected_bias(eigenvalues: np.ndarray, count: int, reference_count: int | None = None) -> float:
    """The Frechet distance to expect of `count` perfect samples, if features were Gaussian.

    Args:
      eigenvalues: of the reference's covariance, [F].
      count, reference_count: n, m; None for statistics of the law itself.
    """
    total = eigenvalues[:, None] + eigenvalues[None, :]
    products = eigenvalues[:, None] * eigenvalues[None, :] / np.where(total > 0, total, 1.0)
    scale = 1.0 / count + (1.0 / reference_count if reference_count else 0.0)
    return float(scale * (eigenvalues.sum() + 0.5 * (products.sum() + np.trace(products))))


def extrapolate(features: np.ndarray, reference: Gaussian, *, points: int = 15, seed: int = 0) -> dict[str, float]:
    """The Frechet distance of infinitely many samples to a reference.

    Args:
      features: [N,F] of the samples, N >= 20.
      reference: whose own finite number of images is not corrected for.
      points: sizes of subsets.
      seed: of the subsets.
    Returns: {"fd_inf", "fd_inf_error": the fit's standard error of it}.
    """
    if points < 3 or len(features) < 20:
        raise ValueError(f"fd_inf: got {points} subsets of {len(features)} images, allowed: 3 or more of 20 or more")
    generator = np.random.default_rng(seed)
    sizes = np.linspace(max(2, len(features) // 10), len(features), points).round().astype(int)
    distances = []
    for size in sizes:
        part = frechet.feature_statistics(features[generator.choice(len(features), size, replace=False)])
        distances.append(frechet.distance(frechet.gaussian(part), reference))
    design = np.stack([np.ones(points), 1.0 / sizes], axis=1)
    solution, _, _, _ = np.linalg.lstsq(design, np.array(distances), rcond=None)
    spread = np.sum((design @ solution - distances) ** 2) / (points - 2)
    error = np.sqrt(spread * np.linalg.inv(design.T @ design)[0, 0])
    return {"fd_inf": float(solution[0]), "fd_inf_error": float(error)}
