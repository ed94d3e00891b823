"""Forward processes x_t = alpha(t) x_0 + sigma(t) n, and their variance-exploding noise level sigma / alpha.

  edm    alpha = 1, sigma = t                        EDM (arXiv 2206.00364), Table 1
  ve     alpha = 1, sigma = sqrt(t)                  Song et al. (arXiv 2011.13456) as in EDM's Table 1
  vp     alpha = exp(-q/2), sigma = sqrt(1 - exp(-q)), q(t) = beta_d t^2 / 2 + beta_min t = int_0^t beta,
         so sigma/alpha = sqrt(exp(q) - 1); t in [epsilon_t, 1]                  Song et al., EDM's Table 1
  ddpm   alpha^2 = alpha_bar_k = prod_{i<=k} (1 - beta_i), beta linear, k = 0..M-1
         Ho et al. (arXiv 2006.11239)
  iddpm  the same with 1 - beta_k = max(f((k+1)/M) / f(k/M), C_1), f(r) = cos^2(pi/2 (r + C_2) / (1 + C_2)),
         Nichol & Dhariwal (arXiv 2102.09672), eq. 17. EDM's table u_j, falling with j, is this one
         reversed: u_{M-1-k} = sigma_k / alpha_k, with u_M = 0 added

Host numbers (Python, numpy) are computed in float64 and stay on the host; jax arrays keep to float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from sim_jax.diffusion.tables import choose, namespace
from sim_jax.types import Array, NoiseLevel


@dataclass(frozen=True, kw_only=True, eq=False)
class Schedule:
    """One forward process.

    Attributes:
      level: t [B] (an integer index where the process is discrete) -> NoiseLevel.
      t_of_sigma: variance-exploding noise level [B] -> t [B]; the nearest index where discrete.
      t_range: the first and last t.
      table: sigma/alpha of a discrete process, float64, increasing; None for a continuous one.
    """

    level: Callable[[Array], NoiseLevel]
    t_of_sigma: Callable[[Array], Array]
    t_range: tuple[float, float]
    table: np.ndarray | None = None

    def ve_sigma(self, t: Array) -> Array:
        """sigma / alpha at t: the noise level of x_t / alpha."""
        level = self.level(t)
        return level.sigma / level.alpha

    @property
    def sigma_range(self) -> tuple[float, float]:
        """Smallest and largest variance-exploding noise level."""
        low, high = (float(self.ve_sigma(t)) for t in self.t_range)
        return low, high

    def round_sigma(self, sigma: Array) -> Array:
        """The nearest noise level that the process has; `sigma` itself where it is continuous."""
        return sigma if self.table is None else self.ve_sigma(self.t_of_sigma(sigma))


def _host(t):
    return t if isinstance(t, jax.Array) else np.asarray(t, np.float64)


def edm(*, sigma_min: float = 0.0, sigma_max: float = math.inf) -> Schedule:
    """EDM's process: t is the noise level."""
    _check_increasing("sigma_min, sigma_max", sigma_min, sigma_max, lower=0.0)

    def level(t):
        t = _host(t)
        return NoiseLevel(t, namespace(t).ones_like(t), t)

    return Schedule(level=level, t_of_sigma=_host, t_range=(sigma_min, sigma_max))


def ve(*, sigma_min: float = 0.02, sigma_max: float = 100.0) -> Schedule:
    """Song's variance-exploding process: t is the noise variance."""
    _check_increasing("sigma_min, sigma_max", sigma_min, sigma_max, lower=0.0)

    def level(t):
        t = _host(t)
        return NoiseLevel(t, namespace(t).ones_like(t), namespace(t).sqrt(t))

    return Schedule(level=level, t_of_sigma=lambda s: _host(s) ** 2, t_range=(sigma_min**2, sigma_max**2))


def vp(*, beta_d: float = 19.9, beta_min: float = 0.1, epsilon_t: float = 1e-5) -> Schedule:
    """Song's variance-preserving process, continuous in t."""
    _check_increasing("beta_min, beta_min + beta_d", beta_min, beta_min + beta_d, lower=0.0)
    _check_increasing("epsilon_t, 1", epsilon_t, 1.0, lower=0.0)

    def level(t):
        t = _host(t)
        xp = namespace(t)
        q = (beta_d * t / 2 + beta_min) * t
        return NoiseLevel(t, xp.exp(-q / 2), xp.sqrt(-xp.expm1(-q)))

    def t_of_sigma(sigma):
        sigma = _host(sigma)
        xp = namespace(sigma)
        q = xp.log1p(sigma**2)
        # the root of q(t) = q without the cancellation of (sqrt(beta_min^2 + 2 beta_d q) - beta_min) / beta_d
        return 2 * q / (xp.sqrt(beta_min**2 + 2 * beta_d * q) + beta_min)

    return Schedule(level=level, t_of_sigma=t_of_sigma, t_range=(epsilon_t, 1.0))


def ddpm(
    *, M: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, endpoint: bool = True
) -> Schedule:
    """DDPM's discrete process with linear betas.

    `endpoint=False` leaves out beta_end itself (beta_k = beta_start + (beta_end - beta_start) k / M), as the
    text-to-image code of Score Implicit Matching does.
    """
    _check_steps(M)
    if not 0 < beta_start <= beta_end < 1:
        raise ValueError(f"beta_start, beta_end: got {beta_start}, {beta_end}, allowed: 0 < start <= end < 1")
    return _discrete(np.linspace(beta_start, beta_end, M, endpoint=endpoint))


def iddpm(*, M: int = 1000, C_1: float = 0.001, C_2: float = 0.008) -> Schedule:
    """iDDPM's discrete process with the cosine alpha_bar; C_1 = 0.001 is its bound beta <= 0.999."""
    _check_steps(M)
    if not 0 < C_1 < 1:
        raise ValueError(f"C_1: got {C_1}, allowed: 0 < C_1 < 1")
    f = np.cos(np.pi / 2 * (np.arange(M + 1) / M + C_2) / (1 + C_2)) ** 2
    return _discrete(1 - np.maximum(f[1:] / f[:-1], C_1))


def _discrete(betas: np.ndarray) -> Schedule:
    """The process of [M] float64 betas; log-sums keep the small noise levels exact."""
    q = -np.cumsum(np.log1p(-betas))
    alphas, sigmas, ve_sigmas = np.exp(-q / 2), np.sqrt(-np.expm1(-q)), np.sqrt(np.expm1(q))
    midpoints = (ve_sigmas[1:] + ve_sigmas[:-1]) / 2

    def level(t):
        if isinstance(t, jax.Array):
            alpha, sigma = (jnp.asarray(table, jnp.float32)[t] for table in (alphas, sigmas))
            return NoiseLevel(t.astype(jnp.float32), alpha, sigma)
        index = np.asarray(t, np.int64)
        return NoiseLevel(index.astype(np.float64), alphas[index], sigmas[index])

    def t_of_sigma(sigma):
        if isinstance(sigma, jax.Array):
            return jnp.searchsorted(jnp.asarray(midpoints, sigma.dtype), sigma)
        return np.searchsorted(midpoints, _host(sigma))

    return Schedule(level=level, t_of_sigma=t_of_sigma, t_range=(0, len(betas) - 1), table=ve_sigmas)


def _check_increasing(key: str, low: float, high: float, *, lower: float) -> None:
    if not lower <= low < high:
        raise ValueError(f"{key}: got {low}, {high}, allowed: {lower} <= first < second")


def _check_steps(M: int) -> None:
    if M < 1:
        raise ValueError(f"M: got {M}, allowed: a whole number of steps from 1")


TABLE = {"edm": edm, "ve": ve, "vp": vp, "ddpm": ddpm, "iddpm": iddpm}


def get(name: str, **knobs) -> Schedule:
    """The forward process `name`; raises ValueError on an unknown name, knob or value."""
    return choose(TABLE, "schedule", name, knobs)()
