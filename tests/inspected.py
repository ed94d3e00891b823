"""A workdir with a checkpoint of launch/rehearsal.py on an fsdp mesh, whose state is known and for which nothing was trained."""

from __future__ import annotations

import json
import pathlib

import jax
import numpy as np

from sim_jax import checkpoint, config_file, sharding
from sim_jax import experiment as experiments
from sim_jax.experiment import Experiment

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS = (3, 7)


def make(workdir: pathlib.Path, *, devices: int = 8) -> tuple[Experiment, object]:
    """Writes it; (experiment, the numpy state of the last step)."""
    config = config_file.load(str(ROOT / "launch" / "rehearsal.py"))
    config.sharding.mesh, config.sharding.rules = "data:-1,fsdp:2", ((".*", "fsdp:fsdp"),)
    experiment = experiments.build(config, devices=jax.devices()[:devices])
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda leaf: np.full(leaf.shape, 5, leaf.dtype) if leaf.dtype.kind == "i" else
                         (0.1 * rng.standard_normal(leaf.shape)).astype(leaf.dtype), experiment.shapes)
    with checkpoint.Checkpoints(workdir / "checkpoints") as checkpoints:
        for step in STEPS:
            state = state.replace(step=np.int32(step))
            checkpoints.save(step, sharding.place(state, experiment.shardings), {"seconds": 1.0})
    names = experiments.plain(config)["ema"]["halflife_kimg"]
    record = {"config": experiments.plain(config), "network": json.loads(json.dumps(dict(experiment.trained.network.spec))),
              "ema_names": [f"ema_{name:g}k" for name in names]}
    (workdir / "config.json").write_text(json.dumps(record))
    return experiment, state
