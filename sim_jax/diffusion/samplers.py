"""ODE and SDE samplers of a denoiser D(x; sigma) in variance-exploding form, and generators of one or a few steps.

The ODE is dx/dsigma = (x - D) / sigma:
  heun      EDM (arXiv 2206.00364), Algorithm 2; Algorithm 1 where S_churn = 0
  euler     the same without the second-order correction
  ddim      Song et al. (arXiv 2010.02502), eq. 12 and 16, for x_t / alpha_t and t = sigma_t / alpha_t:
            x' = D + sqrt(t'^2 - s^2) (x - D) / t + s n,  s^2 = eta^2 t'^2 (t^2 - t'^2) / t^2.
            eta = 0 is Euler's step in sigma, and the first-order exponential integrator in -ln sigma
            (DPM-Solver-1); eta = 1 is ancestral sampling.
  dpmpp_2m  DPM-Solver++(2M) (arXiv 2211.01095), Algorithm 2, h_i = ln(sigma_i / sigma_{i+1}):
            x' = (t'/t) x + (1 - t'/t) (D + h_i / (2 h_{i-1}) (D - D_prev)); first and last step: order one

One step of any of them, from t to t', with unit noise n:
  x_hat = x + churn_std n;  D = D(x_hat; t);  E = D + extrapolate (D - D_prev);  x' = E + ratio (x_hat - E)
  Heun: x' += correction (D(x'; t') - D), correction = (t / t' - 1) / 2;  x' += fresh_std n
The line of Heun is Algorithm 2's average of the slopes at t and t', with the terms that cancel left out.

These scalars are a plan: computed for all steps at once in float64 on the host, handed to the step as
traced scalars, so that one compiled program serves every step but Heun's last (which has one call).
Images keep z's dtype, float32, where EDM iterates in float64: the difference is of rounding size (a test
measures it), and a float64 z under jax_enable_x64 iterates as EDM does.

Loops: "python" calls the step from Python (pass a jitted step to `run`, or a jitted denoiser to `sample`;
inside an outer jit it unrolls); "scan" is one lax.scan, for accelerators: XLA's CPU runs convolutions in
loops very slowly.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sim_jax.diffusion.noise_levels import karras_grid
from sim_jax.types import Array, Cond, DenoiseFn, Key

SAMPLERS = ("heun", "euler", "ddim", "dpmpp_2m")
_MAX_GAMMA = math.sqrt(2) - 1


class Row(NamedTuple):
    """The scalars of one step ([N] each in a plan): from t_hat (t_cur after churn) to t_next."""

    index: Array
    t_hat: Array
    t_next: Array
    ratio: Array
    extrapolate: Array
    correction: Array
    churn_std: Array
    fresh_std: Array


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Everything of a sampler but the network: N steps, the last one to 0, as rows of [N] on the host."""

    sigma_init: float
    rows: Row
    second_order: bool
    stochastic: bool

    @property
    def num_steps(self) -> int:
        return len(self.rows.index)


Carry = tuple[Array, Array]     # x_t and the previous denoised image
StepFn = Callable[..., Carry]   # step(carry, cond, keys or None, row, *, correct: bool) -> carry


def num_calls(sampler: str, num_steps: int) -> int:
    """Network calls for one image: 2 n - 1 for heun (18 steps: 35), n for the others."""
    _check_sampler(sampler)
    return 2 * num_steps - 1 if sampler == "heun" else num_steps


def edm_sigmas(
    num_steps: int,
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    sigma_limits: tuple[float, float] = (0.0, math.inf),
    round_sigma: Callable | None = None,
) -> np.ndarray:
    """EDM's noise levels (eq. 5), [num_steps] float64, falling, without the final 0.

    Args:
      sigma_limits: what the network supports; sigma_min and sigma_max are clipped to it.
      round_sigma: maps noise levels to ones the network knows (a discrete process); None keeps them.

    Raises:
      ValueError: no steps, or an empty range.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps: got {num_steps}, allowed: a whole number from 1")
    low, high = max(sigma_min, sigma_limits[0]), min(sigma_max, sigma_limits[1])
    sigmas = karras_grid(num_steps, sigma_min=low, sigma_max=high, rho=rho)[::-1]
    return sigmas if round_sigma is None else np.asarray(round_sigma(sigmas), np.float64)


def plan(
    sampler: str,
    sigmas: np.ndarray,
    *,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = math.inf,
    S_noise: float = 1.0,
    eta: float = 0.0,
    round_sigma: Callable | None = None,
) -> Plan:
    """The steps of `sampler` through the falling noise levels `sigmas` [N] and on to 0.

    Args:
      S_churn, S_min, S_max, S_noise: EDM's stochasticity, for heun and euler.
      eta: DDIM's stochasticity, 0 to 1.
      round_sigma: as in `edm_sigmas`, for the raised noise level t_hat.

    Raises:
      ValueError: an unknown sampler, a knob that it does not have, or noise levels out of order.
    """
    t_cur = np.asarray(sigmas, np.float64)
    _check_knobs(sampler, t_cur, S_churn=S_churn, eta=eta)
    t_next = np.append(t_cur[1:], 0.0)
    gamma = min(S_churn / len(t_cur), _MAX_GAMMA) * ((S_min <= t_cur) & (t_cur <= S_max))
    t_hat = t_cur * (1 + gamma)
    if round_sigma is not None:
        t_hat = np.asarray(round_sigma(t_hat), np.float64)
    churn_std = S_noise * np.sqrt(np.maximum(t_hat**2 - t_cur**2, 0))
    fresh_std = eta * t_next * np.sqrt(1 - (t_next / t_cur) ** 2)
    extrapolate = np.zeros_like(t_cur)
    if sampler == "dpmpp_2m":
        h = -np.diff(np.log(t_cur))
        extrapolate[1:-1] = h[1:] / (2 * h[:-1])
    correction = np.zeros_like(t_cur)
    if sampler == "heun":
        correction[:-1] = (t_hat[:-1] / t_next[:-1] - 1) / 2
    rows = Row(
        index=np.arange(len(t_cur), dtype=np.int32),
        t_hat=t_hat,
        t_next=t_next,
        ratio=np.sqrt(t_next**2 - fresh_std**2) / t_hat,
        extrapolate=extrapolate,
        correction=correction,
        churn_std=churn_std,
        fresh_std=fresh_std,
    )
    stochastic = bool(np.any(churn_std) or np.any(fresh_std))
    return Plan(float(t_cur[0]), rows, second_order=sampler == "heun", stochastic=stochastic)


def make_step(denoise: DenoiseFn) -> StepFn:
    """One step of any plan as a pure function: step(carry, cond, keys, row, *, correct) -> carry.

    To keep weights out of the compiled program's constants, jit it with the parameters as an argument:

      def step(params, *args, correct):
          return make_step(partial(apply, params))(*args, correct=correct)
      jitted = jax.jit(step, static_argnames="correct")
      x0 = run(partial(jitted, params), z, cond, plan)

    `keys` [B] (None: no noise) are folded with the step's index: the noise of image i depends on keys[i]
    alone, and is sharded as the keys are. `correct` (static) makes Heun's second call.
    """

    def step(carry: Carry, cond: Cond, keys: Key | None, row: Row, *, correct: bool) -> Carry:
        x, previous = carry
        index = row.index
        row = Row(*(jnp.asarray(value, x.dtype) for value in row))
        noise = None if keys is None else _noise(keys, index, x)
        x_hat = x if noise is None else x + row.churn_std * noise
        denoised = denoise(x_hat, jnp.full(x.shape[:1], row.t_hat), cond).astype(x.dtype)
        estimate = denoised + row.extrapolate * (denoised - previous)
        x_next = estimate + row.ratio * (x_hat - estimate)
        if correct:
            denoised_next = denoise(x_next, jnp.full(x.shape[:1], row.t_next), cond).astype(x.dtype)
            x_next = x_next + row.correction * (denoised_next - denoised)
        if noise is not None:
            x_next = x_next + row.fresh_std * noise
        return x_next, denoised

    return step


def run(
    step: StepFn, z: Array, cond: Cond, plan: Plan, *, keys: Key | None = None, loop: str = "python"
) -> Array:
    """Takes unit noise z [B,H,W,C] through the plan's steps to x_0 [B,H,W,C].

    Args:
      keys: [B] typed keys, one per image; needed where the plan is stochastic.
      loop: "python" (host loop, or unrolled under jit) or "scan".

    Raises:
      ValueError: no keys for a stochastic plan, or an unknown loop.
    """
    if loop not in ("python", "scan"):
        raise ValueError(f"loop: got {loop!r}, allowed: python, scan")
    if plan.stochastic and keys is None:
        raise ValueError("keys: got None, allowed: one key per image where S_churn or eta is above 0")
    keys = keys if plan.stochastic else None
    carry = (z * plan.sigma_init, jnp.zeros_like(z))
    last, done = plan.num_steps - 1, 0
    if loop == "scan" and last > 0:
        def body(carry: Carry, row: Row) -> tuple[Carry, None]:
            return step(carry, cond, keys, row, correct=plan.second_order), None

        carry, _ = jax.lax.scan(body, carry, Row(*(value[:last] for value in plan.rows)))
        done = last
    for i in range(done, plan.num_steps):
        row = Row(*(value[i] for value in plan.rows))
        carry = step(carry, cond, keys, row, correct=plan.second_order and i < last)
    return carry[0]


def sample(
    denoise: DenoiseFn,
    z: Array,
    cond: Cond,
    *,
    sampler: str = "heun",
    num_steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    keys: Key | None = None,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = math.inf,
    S_noise: float = 1.0,
    eta: float = 0.0,
    sigma_limits: tuple[float, float] = (0.0, math.inf),
    round_sigma: Callable | None = None,
    loop: str = "python",
) -> Array:
    """Unit noise z [B,H,W,C] -> x_0 [B,H,W,C]; `edm_sigmas`, `plan` and `run` in one call (see there)."""
    sigmas = edm_sigmas(num_steps, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho,
                        sigma_limits=sigma_limits, round_sigma=round_sigma)
    steps = plan(sampler, sigmas, S_churn=S_churn, S_min=S_min, S_max=S_max, S_noise=S_noise, eta=eta,
                 round_sigma=round_sigma)
    return run(make_step(denoise), z, cond, steps, keys=keys, loop=loop)


@dataclasses.dataclass(frozen=True)
class FewStep:
    """A generator of one or a few calls, with fresh noise n_k between them (consistency models' multistep sampling, DMD2's generators):

        x_1 = sigma_1 z,    x0_k = D(x_k; sigma_k),    x_{k+1} = x0_k + sigma_{k+1} n_k,    the sample is the last x0_k

    Attributes:
      sigmas: falling noise levels, one a call; the first is the generator's sigma_init.
      sigma_cond: what a one-step generator is told instead of sigma_1 (DMD2's SDXL says another time step than that of its input).
    """

    sigmas: tuple[float, ...] = (2.5,)
    sigma_cond: float | None = None

    def __post_init__(self) -> None:
        if not self.sigmas or not all(0 < s < math.inf for s in self.sigmas) or any(b >= a for a, b in zip(self.sigmas, self.sigmas[1:])):
            raise ValueError(f"sigmas: got {self.sigmas}, allowed: one or more falling noise levels above 0")
        if self.sigma_cond is not None and (len(self.sigmas) > 1 or not 0 < self.sigma_cond < math.inf):
            raise ValueError(f"sigma_cond: got {self.sigma_cond} with {len(self.sigmas)} steps, allowed: above 0, with one step")

    def told(self, step: int) -> float:
        """The noise level that the network is told in call `step` (from 0)."""
        return self.sigmas[step] if self.sigma_cond is None else self.sigma_cond


def few_step(denoise: DenoiseFn, z: Array, renoise: Sequence[Array], cond: Cond, *, plan: FewStep) -> Array:
    """The sample of a few-step generator; one call where `plan` has one level.

    Args:
      denoise: the generator's network.
      z: [B,H,W,C] unit noise.
      renoise: unit noise of the same shape, one for each call after the first.
      cond: of every call.
    """
    x0 = jnp.zeros_like(z)
    for step, (sigma, noise) in enumerate(zip(plan.sigmas, (z, *renoise), strict=True)):
        x0 = denoise(x0 + sigma * noise, jnp.full(z.shape[:1], plan.told(step), z.dtype), cond)
    return x0


def _noise(keys: Key, index: Array, x: Array) -> Array:
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), x.shape[1:], x.dtype))(keys)


def _check_sampler(sampler: str) -> None:
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler: got {sampler!r}, allowed: {', '.join(SAMPLERS)}")


def _check_knobs(sampler: str, sigmas: np.ndarray, *, S_churn: float, eta: float) -> None:
    _check_sampler(sampler)
    if S_churn < 0 or (S_churn > 0 and sampler not in ("heun", "euler")):
        raise ValueError(f"S_churn: got {S_churn} for {sampler!r}, allowed: 0, or above with heun and euler")
    if not 0 <= eta <= 1 or (eta > 0 and sampler != "ddim"):
        raise ValueError(f"eta: got {eta} for {sampler!r}, allowed: 0, or up to 1 with ddim")
    if sigmas.ndim != 1 or len(sigmas) < 1 or not np.all(sigmas > 0) or np.any(np.diff(sigmas) > 0):
        raise ValueError(f"sigmas: got {sigmas.tolist()}, allowed: a falling sequence above 0")
    if sampler == "dpmpp_2m" and np.any(np.diff(sigmas) == 0):
        raise ValueError(f"sigmas: got a repeat in {sigmas.tolist()}, allowed with dpmpp_2m: all different")
