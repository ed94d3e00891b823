"""Whether training is still made of numbers: NaN and Inf are found before they are saved, and said where they began.

The step itself says it, in one number: `health/code` is 0, or the sum of

    1, 2, 4     the parameters of the generator, the fake score, the discriminator were not finite before this iteration
    8           a loss or a gradient norm of this iteration is not finite

Nothing waits for it: the codes of the iterations since the last line of metrics.jsonl are read when the next line is due, when they
have long arrived. Each score loss also tells how many of its samples are not finite and at which noise levels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sim_jax import steps
from sim_jax.recipe import Recipe, Role
from sim_jax.state import DistillState
from sim_jax.types import Array, Key, Params

CODE, BAD, SIGMA = "health/code", "health_bad", "health_sigma"
_BITS = {"generator": 1, "fake_score": 2, "discriminator": 4}
_FIGURE = 8
_FIGURES = ("loss", "grad_norm")


class Diverged(FloatingPointError):
    """One line: what is not finite, since which iteration.

    Attributes:
      short: that alone, without what can be done.
    """

    def __init__(self, short: str, more: str = ""):
        super().__init__(short + more)
        self.short = short


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pace:
    """How much slower than configured a run learns, after so many rollbacks; saved with every checkpoint.

    Attributes:
      rolls_back: whether it may roll back at all; then the factor is an argument of the step from the start, and no value compiles anew.
    """

    rollbacks: int
    lr_scale: float
    rolls_back: bool
    factor: float
    limit: int

    @classmethod
    def read(cls, meta: Mapping[str, Any], section: Any) -> Pace:
        """Of a checkpoint's meta and the config's `run`."""
        return cls(rollbacks=int(meta.get("rollbacks", 0)), lr_scale=float(meta.get("lr_scale", 1.0)), factor=section.rollback_lr,
                   rolls_back=section.on_divergence == "rollback", limit=section.max_rollbacks)

    def slower(self, error: Diverged) -> Pace:
        """After one more rollback. Raises: `error` where none is allowed, or none is left."""
        if not self.rolls_back:
            raise error
        if self.rollbacks >= self.limit:
            raise Diverged(error.short, f"; the {self.limit} rollbacks of run.max_rollbacks are used up") from error
        return dataclasses.replace(self, rollbacks=self.rollbacks + 1, lr_scale=self.lr_scale * self.factor)

    @property
    def text(self) -> str:
        return f"with {self.lr_scale:g} times the learning rates (rollback {self.rollbacks} of {self.limit})"

    @property
    def meta(self) -> dict[str, Any]:
        return {"rollbacks": self.rollbacks, "lr_scale": self.lr_scale} if self.rollbacks else {}

    @property
    def figures(self) -> dict[str, float]:
        return {"lr_scale": self.lr_scale} if self.rollbacks else {}

    def argument(self, where: jax.sharding.Sharding) -> Array | None:
        """For `watched_step`."""
        return jax.device_put(np.float32(self.lr_scale), where) if self.rolls_back or self.rollbacks else None


def _watched(loss: Callable[..., Any]) -> Callable[..., Any]:
    """A score loss that also tells which samples are not finite: their share, and the sum of their noise levels over the batch."""

    def pair_loss(nets, x0, noise, level, cond):
        value, metrics = loss(nets, x0, noise, level, cond)
        bad = 1.0 - jnp.isfinite(value).astype(jnp.float32)
        return value, {**metrics, BAD: bad, SIGMA: bad * level.sigma}

    return pair_loss


def _slowed(role: Role | None, factor: Array | None) -> Role | None:
    """A role whose updates are `factor` times as long: with optax's chains, that is `factor` times the learning rate."""
    if role is None or factor is None:
        return role
    optimizer = role.optimizer

    def update(grads, state, params=None):
        updates, state = optimizer.update(grads, state, params)
        return jax.tree.map(lambda u: factor * u, updates), state

    return dataclasses.replace(role, optimizer=optax.GradientTransformation(optimizer.init, update))


def watched_step(recipe: Recipe, state: DistillState, teacher_params: Params | None, key: Key, batch: Mapping[str, Any] | None = None,
                 lr_scale: Array | None = None, *, update_critic: bool = True, update_generator: bool = True
                 ) -> tuple[DistillState, dict[str, Array]]:
    """`steps.train_step`, with its health among the metrics, and every learning rate times `lr_scale` (None: as they are)."""
    objective, gan = recipe.objective, recipe.adversary
    recipe = dataclasses.replace(
        recipe,
        objective=dataclasses.replace(objective, pair_loss=_watched(objective.pair_loss),
                                      critic_loss=_watched(objective.critic_loss or objective.pair_loss)),
        generator=_slowed(recipe.generator, lr_scale), fake_score=_slowed(recipe.fake_score, lr_scale),
        adversary=gan and dataclasses.replace(gan, role=_slowed(gan.role, lr_scale)))
    code = sum(bit * (~_finite(getattr(state, name).params)).astype(jnp.int32)
               for name, bit in _BITS.items() if getattr(state, name) is not None)
    state, metrics = steps.train_step(recipe, state, teacher_params, key, batch, update_critic=update_critic,
                                      update_generator=update_generator)
    figures = jnp.stack([value for name, value in metrics.items() if name.endswith(_FIGURES)])
    return state, {**metrics, CODE: code + _FIGURE * (~jnp.all(jnp.isfinite(figures))).astype(jnp.int32)}


def watched(metrics: Mapping[str, Array]) -> dict[str, Array]:
    """What `Monitor` wants of an iteration's metrics."""
    return {name: value for name, value in metrics.items() if name.endswith((*_FIGURES, CODE, BAD, SIGMA))}


def logged(metrics: Mapping[str, Array]) -> dict[str, Array]:
    """What is written of them."""
    return {name: value for name, value in metrics.items() if not name.endswith((CODE, BAD, SIGMA))}


def _finite(tree: Any) -> Array:
    flags = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.all(jnp.stack(flags)) if flags else jnp.asarray(True)


def parts(state: DistillState) -> dict[str, Array]:
    """{what: whether it is finite} of everything that is saved; to be jitted."""
    out = {}
    for name in _BITS:
        network = getattr(state, name)
        if network is not None:
            where = name.replace("_", " ")
            out |= {f"the parameters of the {where}": _finite(network.params), f"the optimiser state of the {where}": _finite(network.opt_state),
                    f"the averages of the {where}": _finite(network.ema)}
    return out | {"the objective's memory": _finite(state.objective_state)}


def check_finite(params: Params | None, key: str) -> None:
    """Raises ValueError for weights on the host that are not finite, naming the array."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not np.isfinite(leaf).all():
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(f"{key}: got NaN or infinity in {name}, allowed: finite weights")


class Monitor:
    """Reads the health of past iterations, one line late, and raises Diverged.

    Args:
      batch_size: samples of an iteration.
      state_check: `parts`, jitted.
      teacher_params: looked at when the generator's loss is not finite.
      known_good: gives the newest complete checkpoint.
    """

    def __init__(self, batch_size: int, state_check: Callable[[DistillState], dict[str, Array]], teacher_params: Params | None,
                 known_good: Callable[[], int | None]):
        self._batch_size, self._state_check, self._teacher_params, self._known_good = batch_size, state_check, teacher_params, known_good
        self._before: list[tuple[int, list[dict[str, Array]]]] = []
        self._since: list[tuple[int, list[dict[str, Array]]]] = []

    def add(self, first: int, turns: list[dict[str, Array]]) -> None:
        """Takes what is `watched` of iterations that made steps `first`, first + 1, ...: for each turn of a cycle all its iterations', in order."""
        for turn in turns:
            turn[CODE].copy_to_host_async()
        self._since.append((first, turns))

    def line(self) -> None:
        """Checks the iterations up to the last line. Raises: Diverged."""
        self._check(self._before)
        self._before, self._since = self._since, []

    def everything(self, step: int, state: DistillState) -> None:
        """Checks all iterations so far, and what the last one made, before `state` is saved as `step`. Raises: Diverged."""
        self._check(self._before + self._since)
        self._before, self._since = [], []
        wrong = [name for name, good in jax.device_get(self._state_check(state)).items() if not good]
        if wrong:
            self._stop(f"after step {step} {' and '.join(wrong)} are NaN or infinite")

    def _check(self, calls: list[tuple[int, list[dict[str, Array]]]]) -> None:
        found = jax.device_get([[turn[CODE] for turn in turns] for _, turns in calls])
        for (first, turns), per_turn in zip(calls, found, strict=True):
            codes = np.stack(per_turn, -1).reshape(-1)
            if codes.any():
                wrong = int(np.flatnonzero(codes)[0])
                cycle, turn = divmod(wrong, len(turns))
                figures = {name: float(value.reshape(-1)[cycle]) for name, value in jax.device_get(turns[turn]).items()}
                self._stop(self._explain(first + wrong, int(codes[wrong]), figures))

    def _explain(self, step: int, code: int, figures: dict[str, float]) -> str:
        broken = [name.replace("_", " ") for name, bit in _BITS.items() if code & bit]
        if broken:
            return f"at step {step} the parameters of the {' and the '.join(broken)} are NaN or infinite"
        name = min((n for n, v in figures.items() if n.endswith(_FIGURES) and not math.isfinite(v)), key=_order)
        role = name.split("/")[0]
        text = f"{name} is {figures[name]} at step {step}{self._levels(figures.get(f'{role}/{BAD}'), figures.get(f'{role}/{SIGMA}'))}"
        if role == "generator" and self._teacher_params is not None and not bool(jax.jit(_finite)(self._teacher_params)):
            text += ": the parameters of the teacher are NaN or infinite"
        return text

    def _levels(self, share: float | None, total: float | None) -> str:
        """In how many samples a score loss is not finite, and where."""
        if not share:
            return ""
        count = round(share * self._batch_size)
        if count == self._batch_size or not math.isfinite(total):
            return f" (in {count} of {self._batch_size} samples)"
        return f" (in {count} of {self._batch_size} samples, at noise levels of sigma {total / share:.3g} on average)"

    def _stop(self, text: str) -> None:
        step = self._known_good()
        left = "no checkpoint was written" if step is None else f"the last checkpoint is intact (step {step})"
        raise Diverged(text, f": training has diverged; {left}; lower the learning rates or clip gradients (optimizer.clip_norm), or resume "
                             "with --config.run.on_divergence=rollback")


def _order(name: str) -> tuple[int, int, str]:
    """The order in which an iteration computes its figures: critic first, terms before their sum, gradients last."""
    role, figure = name.split("/", 1)
    return role == "generator", (2 if figure == "grad_norm" else 1 if figure == "loss" and role != "discriminator" else 0), name
