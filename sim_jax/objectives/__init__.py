"""The methods, as one literal table. A new one: a file with `pair_loss` and `OBJECTIVE`, and a row here."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from sim_jax.objectives import diff_instruct, dmd, dmd2, dsm, f_distill, sid, sida, sim, uni
from sim_jax.objectives.base import Nets, Objective, PairLoss, check_knobs, knobs_of, look_up
from sim_jax.types import Cond, NoiseLevel

TABLE: dict[str, Objective] = {
    "sim": sim.OBJECTIVE,
    "sid": sid.OBJECTIVE,
    "diff_instruct": diff_instruct.OBJECTIVE,
    "dmd": dmd.OBJECTIVE,
    "dmd2": dmd2.OBJECTIVE,
    "f_distill": f_distill.OBJECTIVE,
    "sida": sida.OBJECTIVE,
    "uni": uni.OBJECTIVE,
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
      **knobs: keyword arguments of the method's `pair_loss`, `init_memory` and `update_memory`; each of the
        three gets those that it takes.

    Returns:
      An `Objective`; `objective.pair_loss(nets, x0, noise, level, cond) -> (loss [B], metrics)`.

    Raises:
      ValueError: unknown method or knob, or a value that the method refuses; one line with what is allowed.
    """
    method = look_up("method", TABLE, name)
    method = _bind(name, method, knobs)
    if method.critic_loss is None:
        if critic or critic_steps:
            got = critic or critic_steps
            raise ValueError(f"critic of {name!r}: got {got!r}, allowed: none, it has no critic")
        return method
    steps = method.critic_steps if critic_steps is None else critic_steps
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"critic_steps: got {steps!r}, allowed: integers >= 1")
    check_knobs(f"{name}'s critic", critic or {}, knobs_of(method.critic_loss))
    critic_loss = functools.partial(method.critic_loss, **(critic or {}))
    _try(critic_loss, None)
    return replace(method, critic_loss=critic_loss, critic_steps=steps)


def _bind(name: str, method: Objective, knobs: Mapping[str, Any]) -> Objective:
    """`method` with its knobs bound, tried once on abstract values: a bad knob must not wait for a compiler."""
    parts = {field: getattr(method, field) for field in ("pair_loss", "init_memory", "update_memory")}
    parts = {field: part for field, part in parts.items() if part is not None}
    check_knobs(name, knobs, dict.fromkeys(knob for part in parts.values() for knob in knobs_of(part)))
    for field, part in parts.items():
        own = set(knobs_of(part))
        parts[field] = functools.partial(part, **{k: v for k, v in knobs.items() if k in own})
    bound = replace(method, **parts)
    memory = None if bound.init_memory is None else jax.eval_shape(bound.init_memory)
    means = _try(bound.pair_loss, memory)
    if bound.update_memory is not None:
        assert jax.eval_shape(bound.update_memory, memory, means) == memory
    return bound


def _try(loss: PairLoss, memory: Any) -> dict[str, Any]:
    """Evaluates `loss` on the shapes of two small images; the shapes of what it would remember."""
    image, scalar = jax.ShapeDtypeStruct((2, 4, 4, 1), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.float32)
    level = NoiseLevel(scalar, scalar, scalar)

    def identity(x: Any, *_: Any) -> Any:
        return x

    def call(memory: Any, *inputs: Any) -> Any:
        nets = Nets(identity, identity, identity, lambda x, *_: x.reshape(x.shape[0], -1), memory)
        return loss(nets, *inputs, Cond())

    _, metrics = jax.eval_shape(call, memory, image, image, level)
    means = {key.removeprefix("memory/"): value for key, value in metrics.items() if key.startswith("memory/")}
    return {key: jax.ShapeDtypeStruct(value.shape[1:], value.dtype) for key, value in means.items()}
