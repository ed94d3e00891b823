"""The methods, as one literal table. A new one: a file with `pair_loss` and `OBJECTIVE`, and a row here."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from sim_jax.objectives import diff_instruct, dsm, sid, sim
from sim_jax.objectives.base import Nets, Objective, PairLoss, check_knobs, look_up
from sim_jax.types import Cond, NoiseLevel

TABLE: dict[str, Objective] = {
    "sim": sim.OBJECTIVE,
    "sid": sid.OBJECTIVE,
    "diff_instruct": diff_instruct.OBJECTIVE,
    "dsm": dsm.OBJECTIVE,
}


def get(
    name: str, *, critic: Mapping[str, Any] | None = None, critic_steps: int | None = None, **knobs: Any
) -> Objective:
    """The method `name` with its knobs bound, every one checked here and not at the first step.

    Args:
      name: a row of `TABLE`.
      critic: knobs of the critic's loss (`dsm.pair_loss` for `sim`), for example `{"weighting": "dmd2"}`.
      critic_steps: updates of the critic before each update of the generator; `None`: the method's own.
      **knobs: keyword arguments of the method's `pair_loss`.

    Returns:
      An `Objective`; `objective.pair_loss(nets, x0, noise, level, cond) -> (loss [B], metrics)`.

    Raises:
      ValueError: unknown method or knob, or a value that the method refuses; one line with what is allowed.
    """
    method = look_up("method", TABLE, name)
    pair_loss = _bind(name, method.pair_loss, knobs)
    if method.critic_loss is None:
        if critic or critic_steps:
            got = critic or critic_steps
            raise ValueError(f"critic of {name!r}: got {got!r}, allowed: none, it has no critic")
        return replace(method, pair_loss=pair_loss)
    steps = method.critic_steps if critic_steps is None else critic_steps
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"critic_steps: got {steps!r}, allowed: integers >= 1")
    critic_loss = _bind(f"{name}'s critic", method.critic_loss, dict(critic or {}))
    return replace(method, pair_loss=pair_loss, critic_loss=critic_loss, critic_steps=steps)


def _bind(owner: str, loss: PairLoss, knobs: dict[str, Any]) -> PairLoss:
    """`loss` with its knobs bound, tried once on abstract values: a bad knob must not wait for a compiler."""
    check_knobs(owner, loss, knobs)
    bound = functools.partial(loss, **knobs)
    image, scalar = jax.ShapeDtypeStruct((2, 4, 4, 1), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.float32)
    identity, level = Nets(*[lambda x, *_: x for _ in Nets._fields]), NoiseLevel(scalar, scalar, scalar)
    jax.eval_shape(functools.partial(bound, identity), image, image, level, Cond())
    return bound
