"""How iterations reach the devices: one compiled program a turn, or several iterations in one (`run.steps_per_call`).

A call costs the host about the same whatever is in it. Where an iteration takes longer than that the devices never wait for the host; where it
is shorter, as with small networks, several iterations in one program, looped over by `lax.scan`, keep them busy. On CPUs convolutions inside
of loops are slow, dense networks gain.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sim_jax import compiling, health
from sim_jax.experiment import Experiment
from sim_jax.recipe import Recipe
from sim_jax.state import DistillState
from sim_jax.types import Array, Key, Params

Metrics = dict[str, Array]
Turn = Mapping[str, bool]
Batch = Mapping[str, Any] | None


def _jit(experiment: Experiment, fn: Callable[..., Any], **options: Any):
    told = compiling.options(experiment.layout.mesh, experiment.trained.network.spec)
    return jax.jit(functools.partial(fn, experiment.recipe), donate_argnums=0, compiler_options=told, **options)


def make_step(experiment: Experiment):
    """The jitted training iteration: (state, teacher_params, key, batch, lr_scale, *, update_critic, update_generator) -> (state, metrics)."""
    return _jit(experiment, health.watched_step, static_argnames=("update_critic", "update_generator"),
                out_shardings=(experiment.shardings, experiment.layout.replicated))


def several(recipe: Recipe, state: DistillState, teacher_params: Params | None, key: Key, batches: Sequence[Batch], lr_scale: Array | None = None,
            *, cycle: tuple[Turn, ...]) -> tuple[DistillState, Metrics, list[Metrics]]:
    """`len(batches)` iterations of `health.watched_step`, as so many calls make them.

    Args:
      batches: of each iteration; their number is a multiple of the cycle's.
      cycle: static, whose turn it is, again and again.
    Returns: (state, the last iteration's metrics, for each turn of the cycle what `health.watched` keeps of its iterations [batches / cycle]).
    """
    if len(batches) % len(cycle):
        raise ValueError(f"batches: got {len(batches)}, allowed: multiples of the {len(cycle)} turns of a cycle")

    def once(state: DistillState, parts: Sequence[Batch]) -> tuple[DistillState, list[Metrics]]:
        out = []
        for turn, batch in zip(cycle, parts, strict=True):
            state, metrics = health.watched_step(recipe, state, teacher_params, key, batch, lr_scale, **turn)
            out.append(metrics)
        return state, out

    stacked = [jax.tree.map(lambda *rows: jnp.stack(rows), *batches[i::len(cycle)]) for i in range(len(cycle))]
    state, metrics = jax.lax.scan(once, state, stacked, length=len(batches) // len(cycle))
    return state, {name: values[-1] for name, values in metrics[-1].items()}, [health.watched(part) for part in metrics]


class Calls:
    """The programs of a run, and which iterations each call of them makes.

    Args:
      experiment: its `run.steps_per_call` iterations make a call, wherever the whole call is of one steady cycle; others are made one by one.
    """

    def __init__(self, experiment: Experiment):
        self._experiment, self._size = experiment, experiment.config.run.steps_per_call
        self._step = make_step(experiment)
        self._steady: list[Turn] = []
        if self._size > 1:
            begin = -(-experiment.start_steps // self._size) * self._size
            self._steady = [experiment.turns(begin + i) for i in range(self._size)]
            cycle = tuple(self._steady[:len(experiment.cycle)])
            self._several = _jit(experiment, functools.partial(several, cycle=cycle),
                                 out_shardings=(experiment.shardings, experiment.layout.replicated, experiment.layout.replicated))

    def plan(self, first: int) -> Iterator[range]:
        """The iterations from `first` to the end, call by call."""
        total, size, step = self._experiment.total_steps, self._size, first
        while step < total:
            call = range(step, step + size)
            if size > 1 and (step % size or call.stop > total or [self._experiment.turns(i) for i in call] != self._steady):
                call = range(step, step + 1)
            yield call
            step = call.stop

    def __call__(self, steps: range, state: DistillState, teacher_params: Params | None, key: Key, batches: Iterator[Batch],
                 lr_scale: Array | None) -> tuple[DistillState, Metrics, list[Metrics]]:
        """Makes `steps` of `plan`. Returns: as `several`."""
        if len(steps) > 1:
            return self._several(state, teacher_params, key, [next(batches) for _ in steps], lr_scale)
        state, metrics = self._step(state, teacher_params, key, next(batches), lr_scale, **self._experiment.turns(steps.start))
        return state, metrics, [health.watched(metrics)]
