"""What every objective is made of: types, adapters from a forward process to a denoiser. No formulas.

The forward process at a noise level (t, alpha, sigma) is x_t = alpha * x0 + sigma * noise. A network is a
denoiser D(x; s) of the variance-exploding form x = x0 + s * noise, so another process is served by
rescaling its input:

    D_t(x_t) = D(x_t / alpha; sigma / alpha)                                                   (`denoise`)
    grad_{x_t} log p_t(x_t)       = (alpha * D_t(x_t) - x_t) / sigma^2       for the exact D   (Tweedie)
    grad_{x_t} log q_t(x_t | x0)  = (alpha * x0       - x_t) / sigma^2

hence a difference of two scores at the same x_t is (alpha / sigma^2) times the difference of their
x0-predictions, without the cancellation of the x_t / sigma^2 terms; the objectives use that form
(`score_scale`).

Whose gradient goes where. `Nets` holds functions with the parameters closed over, and an objective's file
alone says, with `stop_gradient`, through which *inputs* gradients flow. That *parameters* are constants is
the caller's business: the generator step differentiates with respect to the generator's parameters only, or
closes the other networks over `jax.lax.stop_gradient(params)`; both leave the networks' input gradients,
which SIM and SiD need, untouched.
"""

from __future__ import annotations

import difflib
import inspect
import numbers
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sim_jax.types import Array, Cond, DenoiseFn, NoiseLevel

# (x_t [B,H,W,C], sigma [B], cond) -> logits [B,L] float32, the arguments of a DenoiseFn; > 0 says "real"
DiscriminateFn = Callable[[Array, Array, Cond | None], Array]


class Nets(NamedTuple):
    """The networks as functions, parameters closed over; `None` where an objective does not use one.

    Attributes:
      generate: z -> x0, for the objectives that call the generator again.
      teacher: the frozen teacher's denoiser D_real.
      fake: the online denoiser D_fake of the generator's distribution; for `dsm` the network that is trained.
      discriminate: the discriminator's logits; exp of their mean estimates p_real(x_t) / p_generated(x_t).
      memory: what the objective carries from one iteration to the next, constant in the loss.
    """

    generate: Callable[..., Array] | None = None
    teacher: DenoiseFn | None = None
    fake: DenoiseFn | None = None
    discriminate: DiscriminateFn | None = None
    memory: Any = None


# (nets, x0 [B,H,W,C], noise [B,H,W,C], level [B], cond, *, knobs) -> (loss [B], metrics {name: [B]});
# a metric named "memory/X", [B] or [B,K], is for `Objective.update_memory` and not for logs
PairLoss = Callable[..., tuple[Array, dict[str, Array]]]


class Published(NamedTuple):
    """A value of the method's own experiments and where it comes from.

    Attributes:
      value: the value.
      source: "repo" or "paper" (read there), "recalled" (unconfirmed), "derived" (algebra from what was read),
        "inferred" (a judgement) or "ours".
      note: what it holds for.
    """

    value: Any
    source: str
    note: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Objective:
    """One distillation (or training) method: pure losses and what they ask for.

    Attributes:
      name: the method's row in `sim_jax.objectives.TABLE`.
      pair_loss: loss of the network being distilled, `(nets, x0, noise, level, cond) -> (loss [B], metrics)`.
      critic_loss: same signature, trains `nets.fake` on generated x0; `None` where there is no critic.
      critic_steps: updates of the critic before each update of the generator.
      needs: which of "teacher", "fake", "discriminator", "data", "pairs" the method cannot do without.
      published: settings of the method's own experiments, each with its provenance.
      init_memory: `(*, knobs) -> memory`, the first `Nets.memory`; `None` where the method carries nothing.
      update_memory: `(memory, means, *, knobs) -> memory` after an iteration; means[X] is the mean of the
        metric "memory/X" over the whole batch, micro-batches and devices included.
    """

    name: str
    pair_loss: PairLoss
    critic_loss: PairLoss | None
    critic_steps: int
    needs: frozenset[str]
    published: Mapping[str, Published] = field(default_factory=dict)
    init_memory: Callable[..., Any] | None = None
    update_memory: Callable[..., Any] | None = None


def expand(per_sample: Array, like: Array) -> Array:
    """[B] -> [B,1,...,1] of `like`'s rank: broadcasting is explicit in this project."""
    return per_sample.reshape(per_sample.shape + (1,) * (like.ndim - per_sample.ndim))


def sum_chw(x: Array) -> Array:
    """Sum over every axis but the batch: [B,...] -> [B]."""
    return jnp.sum(x, axis=tuple(range(1, x.ndim)))


def mean_chw(x: Array) -> Array:
    """Mean over every axis but the batch: [B,...] -> [B]."""
    return jnp.mean(x, axis=tuple(range(1, x.ndim)))


REDUCTIONS: dict[str, Callable[[Array], Array]] = {"sum": sum_chw, "mean": mean_chw}


def diffuse(x0: Array, noise: Array, level: NoiseLevel) -> Array:
    """A sample of q_t(x_t | x0): alpha * x0 + sigma * noise, [B,H,W,C]; differentiable in x0."""
    return expand(level.alpha, x0) * x0 + expand(level.sigma, x0) * noise


def denoise(fn: DenoiseFn, x_t: Array, level: NoiseLevel, cond: Cond | None) -> Array:
    """The x0-prediction of `fn` at x_t of any forward process, [B,H,W,C]; differentiable in x_t."""
    return fn(x_t / expand(level.alpha, x_t), level.sigma / level.alpha, cond)


def logits(fn: DiscriminateFn, x_t: Array, level: NoiseLevel, cond: Cond | None) -> Array:
    """The logits of `fn` at x_t of any forward process, [B,L]: a discriminator takes what a denoiser takes."""
    return denoise(fn, x_t, level, cond)


def score_scale(level: NoiseLevel) -> Array:
    """alpha / sigma^2, [B]: turns a difference of x0-predictions into the difference of the scores."""
    return level.alpha / jnp.square(level.sigma)


def pseudo_target_loss(x0: Array, gradient: Array, *, reduction: str) -> Array:
    """0.5 ||x0 - sg[x0 - gradient]||^2, [B]: its derivative by x0 is `gradient`, over CHW where the mean is taken.

    The form in which distribution matching is written (DMD, variational score distillation). Its value,
    0.5 ||gradient||^2, is not what descends. x0 - sg[x0] is subtracted first, so that rounding at the size of
    x0 does not reach a small gradient.

    Raises:
      ValueError: reduction is not a row of `REDUCTIONS`.
    """
    reduce = look_up("reduction", REDUCTIONS, reduction)
    return 0.5 * reduce(jnp.square(x0 - jax.lax.stop_gradient(x0) + jax.lax.stop_gradient(gradient)))


def prediction_metrics(fake: Array, real: Array, x0: Array) -> dict[str, Array]:
    """What a score objective reports of its two predictions, each [B]: `score_divergence`, mean_CHW
    (D_fake - D_real)^2, `fake_error` and `teacher_error`, mean_CHW (D - x0)^2 of either network."""
    return {
        "score_divergence": mean_chw(jnp.square(fake - real)),
        "fake_error": mean_chw(jnp.square(fake - x0)),
        "teacher_error": mean_chw(jnp.square(real - x0)),
    }


def unknown(key: str, got: object, allowed: Iterable[str]) -> ValueError:
    """The error for a name that is not in a table: one line, with what is allowed and the nearest name."""
    allowed = list(allowed)
    near = difflib.get_close_matches(str(got), allowed, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return ValueError(f"{key}: got {got!r}, allowed: {', '.join(allowed) or 'none'}{hint}")


def look_up(key: str, table: Mapping[str, Any], name: object) -> Any:
    """`table[name]`.

    Raises:
      ValueError: `name` is not in the table.
    """
    if not isinstance(name, str) or name not in table:
        raise unknown(key, name, table)
    return table[name]


def knobs_of(fn: Callable[..., Any]) -> list[str]:
    """The names of the keyword-only arguments of `fn`."""
    return [p.name for p in inspect.signature(fn).parameters.values() if p.kind is p.KEYWORD_ONLY]


def check_knobs(owner: str, knobs: Iterable[str], allowed: Iterable[str]) -> None:
    """Refuses knobs that `owner` does not have.

    Raises:
      ValueError: naming the first such knob and those that are allowed.
    """
    allowed = list(allowed)
    for knob in knobs:
        if knob not in allowed:
            raise unknown(f"knob of {owner}", knob, allowed)


def check_number(key: str, got: object, allowed: str, ok: Callable[[float], bool]) -> None:
    """Refuses what is not a real number or fails `ok`.

    Raises:
      ValueError: quoting `allowed`, the range in words.
    """
    if isinstance(got, bool) or not isinstance(got, numbers.Real) or not ok(got):
        raise ValueError(f"{key}: got {got!r}, allowed: {allowed}")
