"""Distributions of the noise level sigma that training draws from (variance-exploding: alpha = 1, t = sigma).

  log_normal  ln sigma = P_mean + P_std n, n ~ N(0, 1)               EDM (arXiv 2206.00364), Table 1
  karras      sigma = (smax^(1/rho) + (1 - t)(smin^(1/rho) - smax^(1/rho)))^rho, t ~ U[u_min, u_max]
              SiD (arXiv 2404.04057): u_max = 0.8, hence sigma <= 24.4; EDM's eq. 5 with t running upwards
  uniform     sigma (space "sigma") or ln sigma (space "log_sigma") uniform in [sigma_min, sigma_max)
  grid        uniform over the entries i_min <= i < i_max of the Karras grid of M points, small first; DMD2
              (arXiv 2405.14867) draws i in [20, 981) of 1000 for the generator, [0, 1000) for the fake score
  ddpm        uniform over the levels i_min <= i < i_max of DDPM's M with linear betas, small first: what latent diffusion is trained at

Each has a quantile function of a u in [0, 1): the sampler is that function of a uniform draw (log_normal:
the exponential of a normal draw), so given draws give given levels. Host numbers stay float64 on the
host, jax arrays float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.special
import numpy as np
import scipy.special

from sim_jax.diffusion import schedules
from sim_jax.diffusion.tables import choose, namespace
from sim_jax.types import Array, Key, NoiseLevel


def log_normal_from_normal(n: Array, *, P_mean: float = -1.2, P_std: float = 1.2) -> Array:
    """sigma of a standard-normal draw n; any shape."""
    if not P_std > 0:
        raise ValueError(f"P_std: got {P_std}, allowed: above 0")
    return namespace(n).exp(P_mean + P_std * n)


def log_normal_quantile(u: Array, *, P_mean: float = -1.2, P_std: float = 1.2) -> Array:
    """sigma at probability u; 0 at u = 0 and inf at u = 1."""
    ndtri = jax.scipy.special.ndtri if isinstance(u, jax.Array) else scipy.special.ndtri
    return log_normal_from_normal(ndtri(u), P_mean=P_mean, P_std=P_std)


def karras_quantile(
    u: Array,
    *,
    u_min: float = 0.0,
    u_max: float = 0.8,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
) -> Array:
    """sigma at probability u: the Karras ramp at t = u_min + (u_max - u_min) u (t = 1: sigma_max)."""
    if not 0 <= u_min < u_max <= 1:
        raise ValueError(f"u_min, u_max: got {u_min}, {u_max}, allowed: 0 <= u_min < u_max <= 1")
    _check_range(sigma_min, sigma_max)
    if not rho > 0:
        raise ValueError(f"rho: got {rho}, allowed: above 0")
    t = u_min + (u_max - u_min) * u
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (high + (1 - t) * (low - high)) ** rho


def uniform_quantile(
    u: Array, *, sigma_min: float = 0.002, sigma_max: float = 80.0, space: str = "log_sigma"
) -> Array:
    """sigma at probability u, uniform in sigma or in ln sigma."""
    _check_range(sigma_min, sigma_max)
    if space == "sigma":
        return sigma_min + (sigma_max - sigma_min) * u
    if space == "log_sigma":
        return sigma_min * (sigma_max / sigma_min) ** u
    raise ValueError(f"space: got {space!r}, allowed: sigma, log_sigma")


def grid_quantile(
    u: Array,
    *,
    M: int = 1000,
    i_min: int = 20,
    i_max: int = 981,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
) -> Array:
    """sigma at probability u: entry i_min + floor(u (i_max - i_min)) of the Karras grid (u = 1: the last)."""
    if not 0 <= i_min < i_max <= M:
        raise ValueError(f"i_min, i_max: got {i_min}, {i_max}, allowed: 0 <= i_min < i_max <= M = {M}")
    return _entry(u, karras_grid(M, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)[i_min:i_max])


def ddpm_quantile(u: Array, *, M: int = 1000, i_min: int = 0, i_max: int = 1000) -> Array:
    """sigma / alpha at probability u: entry i_min + floor(u (i_max - i_min)) of the M levels (u = 1: the last)."""
    if not 0 <= i_min < i_max <= M:
        raise ValueError(f"i_min, i_max: got {i_min}, {i_max}, allowed: 0 <= i_min < i_max <= M = {M}")
    return _entry(u, schedules.ddpm(M=M).table[i_min:i_max])


def _entry(u: Array, levels: np.ndarray) -> Array:
    xp = namespace(u)
    return xp.asarray(levels)[xp.minimum(xp.floor(u * len(levels)), len(levels) - 1).astype(np.int32)]


def karras_grid(n: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> np.ndarray:
    """EDM's noise levels (eq. 5) in rising order: [n] float64; n = 1 gives sigma_max alone."""
    if n < 1:
        raise ValueError(f"n: got {n}, allowed: a whole number of noise levels from 1")
    t = np.linspace(0, 1, n) if n > 1 else np.ones(1)
    return karras_quantile(t, u_min=0.0, u_max=1.0, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)


def _check_range(sigma_min: float, sigma_max: float) -> None:
    if not 0 < sigma_min < sigma_max < np.inf:
        raise ValueError(f"sigma_min, sigma_max: got {sigma_min}, {sigma_max}, allowed: 0 < first < second")


class Distribution(NamedTuple):
    """sigma = from_draw(draw(key)) has the quantile function `quantile`; both take the same knobs."""

    quantile: Callable[..., Array]
    from_draw: Callable[..., Array]
    draw: Callable[[Key], Array]


TABLE = {
    "log_normal": Distribution(log_normal_quantile, log_normal_from_normal, jax.random.normal),
    "karras": Distribution(karras_quantile, karras_quantile, jax.random.uniform),
    "uniform": Distribution(uniform_quantile, uniform_quantile, jax.random.uniform),
    "grid": Distribution(grid_quantile, grid_quantile, jax.random.uniform),
    "ddpm": Distribution(ddpm_quantile, ddpm_quantile, jax.random.uniform),
}


def quantile(name: str, u: Array, **knobs) -> Array:
    """sigma at probability u [...] of the distribution `name`."""
    return choose({key: entry.quantile for key, entry in TABLE.items()}, "noise_level", name, knobs)(u)


def bin_edges(name: str, num_bins: int, **knobs) -> np.ndarray:
    """[num_bins + 1] float64 noise levels that cut `name` into equally likely bins.

    `np.digitize(sigma, edges[1:-1])` is the bin of a noise level. log_normal's outer edges are 0 and inf.
    """
    if num_bins < 1:
        raise ValueError(f"num_bins: got {num_bins}, allowed: a whole number from 1")
    return quantile(name, np.linspace(0, 1, num_bins + 1), **knobs)


def make(name: str, **knobs) -> Callable[[Key], NoiseLevel]:
    """A sampler of noise levels: keys [B], one per sample -> NoiseLevel, entries [B] float32.

    Entry i depends on keys[i] only. All checks happen here, before anything is traced.

    Raises:
      ValueError: an unknown name, knob or value.
    """
    quantile(name, 0.5, **knobs)
    entry = TABLE[name]

    def sample(keys: Key) -> NoiseLevel:
        sigma = entry.from_draw(jax.vmap(entry.draw)(keys), **knobs).astype(jnp.float32)
        return NoiseLevel(t=sigma, alpha=jnp.ones_like(sigma), sigma=sigma)

    return sample
