"""Whole runs on a tiny network, as a user starts them: what the end-to-end tests share."""

from __future__ import annotations

import pathlib

import numpy as np
import orbax.checkpoint as ocp

from sim_jax import main

ROOT = pathlib.Path(__file__).resolve().parents[1]
NETWORK = ("--config.network.model_channels=8", "--config.network.channel_mult=(1,)", "--config.network.attn_resolutions=()")
SHORT = ("--config.batch_size=16", "--config.total_kimg=0.128", "--config.teacher.num_steps=3", "--config.run.log_every=1",
         "--config.run.probe_every=2", "--config.run.sample_every=4", "--config.run.eval_every=0", "--config.run.save_every=4",
         "--config.run.grid=10", "--config.run.probe_images=8", "--config.run.eval_images=100", "--config.run.batch_per_device=16")
TIMES = ("seconds", "images_per_second")


def command(config: str, workdir, *overrides: str) -> list[str]:
    """The arguments of sim_jax.main for 8 steps of 16 images; `config` such as "digits.py:tiny"; later overrides win."""
    return ["sim_jax.main", f"--config={ROOT / 'configs' / config}", f"--workdir={workdir}", *NETWORK, *SHORT, *overrides]


def train(config: str, workdir, *overrides: str) -> int:
    """The exit code of that run, inside this process."""
    return main.main(command(config, workdir, *overrides))


def saved_state(workdir, step: int) -> dict[str, np.ndarray]:
    """Everything in a checkpoint, {path: array}."""
    import jax

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        folder = pathlib.Path(workdir).absolute() / "checkpoints" / str(step) / "state"
        kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), dict(reader.metadata(folder).item_metadata.tree))
        tree = reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=kinds))
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}
