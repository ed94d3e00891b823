"""Preconditioners: from a raw network F to a denoiser D (Karras et al. 2022, arXiv 2206.00364, table 1).

    D(x; sigma) = c_skip(sigma) x + c_out(sigma) F( c_in(sigma) x ; c_noise(sigma) )          (equation 7)

Names, arguments and defaults are those of EDM's public code, and "Precond" EDM2's; "DDPMPrecond" is for networks of DDPM's process,
"Analytic" for raw networks that are denoisers themselves. All take x in variance-exploding form, x = x_0 + sigma n.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from sim_jax.diffusion import schedules
from sim_jax.types import Array


class Coefficients(NamedTuple):
    """Equation 7's coefficients, each [B] float32."""

    c_skip: Array
    c_out: Array
    c_in: Array
    c_noise: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preconditioner:
    """A row of EDM's table 1.

    Attributes:
      coefficients: sigma [B] -> Coefficients.
      sigma_min, sigma_max: the noise levels that the network supports.
      out_factor: output channels of F per image channel (2: the second half is a variance and is dropped).
      round_sigma: sigma -> the nearest noise level that the network was trained on.
      tables: buffers that PyTorch checkpoints carry, by name; they follow from the arguments.
    """

    coefficients: Callable[[Array], Coefficients]
    sigma_min: float
    sigma_max: float
    out_factor: int = 1
    round_sigma: Callable[[Array], Array] = lambda sigma: sigma
    tables: tuple[tuple[str, np.ndarray], ...] = ()


def edm(*, sigma_min: float = 0.0, sigma_max: float = float("inf"), sigma_data: float = 0.5) -> Preconditioner:
    """EDM (its equations 144-147 and table 1, last column)."""

    def coefficients(sigma: Array) -> Coefficients:
        total = sigma**2 + sigma_data**2
        c_in = jnp.power(total, -0.5)  # once: 1 / sqrt and 1 / sqrt times something are different programs to a compiler
        return Coefficients(sigma_data**2 / total, sigma * sigma_data * c_in, c_in, jnp.log(sigma) / 4)

    return Preconditioner(coefficients=coefficients, sigma_min=sigma_min, sigma_max=sigma_max)


def edm2(*, sigma_data: float = 0.5) -> Preconditioner:
    """EDM2 (arXiv 2312.02696): EDM's formulas, without limits on the noise level."""
    return edm(sigma_data=sigma_data)


def vp(*, beta_d: float = 19.9, beta_min: float = 0.1, M: int = 1000, epsilon_t: float = 1e-5) -> Preconditioner:
    """Variance-preserving networks: sigma(t)^2 = exp(beta_d t^2 / 2 + beta_min t) - 1."""

    def sigma_of(t: float) -> float:
        return float(np.sqrt(np.expm1(0.5 * beta_d * t**2 + beta_min * t)))

    def coefficients(sigma: Array) -> Coefficients:
        t = (jnp.sqrt(beta_min**2 + 2 * beta_d * jnp.log1p(sigma**2)) - beta_min) / beta_d
        return Coefficients(jnp.ones_like(sigma), -sigma, 1 / jnp.sqrt(sigma**2 + 1), (M - 1) * t)

    return Preconditioner(coefficients=coefficients, sigma_min=sigma_of(epsilon_t), sigma_max=sigma_of(1.0))


def ve(*, sigma_min: float = 0.02, sigma_max: float = 100.0) -> Preconditioner:
    """Variance-exploding networks."""

    def coefficients(sigma: Array) -> Coefficients:
        one = jnp.ones_like(sigma)
        return Coefficients(one, sigma, one, jnp.log(0.5 * sigma))

    return Preconditioner(coefficients=coefficients, sigma_min=sigma_min, sigma_max=sigma_max)


def iddpm_table(*, C_1: float = 0.001, C_2: float = 0.008, M: int = 1000) -> np.ndarray:
    """EDM's u_j for the cosine schedule, [M + 1] float64, falling from u_0 = sigma_max to u_M = 0."""
    alpha_bar = np.sin(0.5 * np.pi * np.arange(M + 1) / M / (C_2 + 1)) ** 2
    u = np.zeros(M + 1)
    for j in range(M, 0, -1):
        u[j - 1] = np.sqrt((u[j] ** 2 + 1) / max(alpha_bar[j - 1] / alpha_bar[j], C_1) - 1)
    return u


def iddpm(*, C_1: float = 0.001, C_2: float = 0.008, M: int = 1000) -> Preconditioner:
    """Improved DDPM's networks (Nichol and Dhariwal 2021): noise levels on a grid of M, twice the output channels."""
    return _discrete(iddpm_table(C_1=C_1, C_2=C_2, M=M).astype(np.float32), out_factor=2)


def ddpm(*, M: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, endpoint: bool = True, learn_sigma: bool = True
         ) -> Preconditioner:
    """Networks of a latent diffusion with linear betas (Ho et al. 2020), which predict its noise: DiT, PixArt-alpha.

    Args:
      M: how many noise levels.
      beta_start, beta_end, endpoint: of `schedules.ddpm`; the text-to-image generators of Score Implicit Matching leave the end out.
      learn_sigma: whether the network has a variance beside the noise, twice the output channels.
    """
    table = schedules.ddpm(M=M, beta_start=beta_start, beta_end=beta_end, endpoint=endpoint).table
    return _discrete(np.append(table[::-1], 0).astype(np.float32), out_factor=2 if learn_sigma else 1)


def _discrete(u: np.ndarray, *, out_factor: int) -> Preconditioner:
    """Networks that know the noise levels u_0 > ... > u_M = 0 by number, c_noise = M - 1 - j, and predict noise."""
    M = len(u) - 1

    def index(sigma: Array) -> Array:
        return jnp.argmin(jnp.abs(sigma[..., None] - jnp.asarray(u).reshape((1,) * sigma.ndim + (-1,))), axis=-1)

    def coefficients(sigma: Array) -> Coefficients:
        c_noise = (M - 1 - index(sigma)).astype(jnp.float32)
        return Coefficients(jnp.ones_like(sigma), -sigma, 1 / jnp.sqrt(sigma**2 + 1), c_noise)

    return Preconditioner(
        coefficients=coefficients, sigma_min=float(u[M - 1]), sigma_max=float(u[0]), out_factor=out_factor,
        round_sigma=lambda sigma: jnp.asarray(u)[index(jnp.asarray(sigma, jnp.float32))], tables=(("u", u),))


def analytic() -> Preconditioner:
    """None: the raw network takes (x, sigma) and is the denoiser."""

    def coefficients(sigma: Array) -> Coefficients:
        one = jnp.ones_like(sigma)
        return Coefficients(jnp.zeros_like(sigma), one, one, sigma)

    return Preconditioner(coefficients=coefficients, sigma_min=0.0, sigma_max=float("inf"))


_TABLE: dict[str, Callable[..., Preconditioner]] = {
    "EDMPrecond": edm,
    "VPPrecond": vp,
    "VEPrecond": ve,
    "iDDPMPrecond": iddpm,
    "DDPMPrecond": ddpm,
    "Precond": edm2,
    "Analytic": analytic,
}


def names() -> tuple[str, ...]:
    return tuple(_TABLE)


def arguments(name: str) -> tuple[str, ...]:
    """The arguments that preconditioner `name` takes. Raises ValueError for an unknown name."""
    if name not in _TABLE:
        raise ValueError(f"precond: got {name!r}, allowed: {', '.join(_TABLE)}")
    return tuple(inspect.signature(_TABLE[name]).parameters)


def defaults(name: str) -> dict[str, float]:
    """What preconditioner `name` takes for arguments that are not given."""
    arguments(name)
    return {p.name: p.default for p in inspect.signature(_TABLE[name]).parameters.values()}


def make(name: str, **kwargs: float) -> Preconditioner:
    """Builds by EDM's class name, e.g. `make("EDMPrecond", sigma_data=0.5)`. Raises ValueError for unknown names."""
    allowed = arguments(name)
    for key in kwargs:
        if key not in allowed:
            raise ValueError(f"{name}: got unknown argument {key!r}, allowed: {', '.join(allowed)}")
    return _TABLE[name](**kwargs)
