"""What training changes: one `TrainState` per network, and the `DistillState` that is saved and donated."""

from __future__ import annotations

from typing import Any

import flax.struct

from sim_jax.types import Array, Params


@flax.struct.dataclass
class TrainState:
    """One network.

    Attributes:
      step: updates made, int32.
      params: its parameters, float32.
      opt_state: the optimiser's state.
      ema: {name: averaged parameters}, empty where none is kept.
    """

    step: Array
    params: Params
    opt_state: Any = None
    ema: dict[str, Params] = flax.struct.field(default_factory=dict)


@flax.struct.dataclass
class DistillState:
    """Everything trained, hence everything saved. The teacher is not in here: it never changes.

    Attributes:
      step: iterations made, int32.
      generator: None where a teacher is being trained.
      fake_score: tracks the generator's distribution; where a teacher is trained, it is that teacher.
      discriminator: None without an adversarial term.
      objective_state: whatever an objective carries from step to step.
    """

    step: Array
    generator: TrainState | None = None
    fake_score: TrainState | None = None
    discriminator: TrainState | None = None
    objective_state: Any = None
