"""Whole runs on a tiny network, as a user starts them: what the end-to-end tests share."""

from __future__ import annotations

import pathlib

import numpy as np
import orbax.checkpoint as ocp
import tiny

from sim_jax import main, networks, weights

ROOT = pathlib.Path(__file__).resolve().parents[1]
NETWORK = ("--config.network.model_channels=8", "--config.network.channel_mult=(1,)", "--config.network.attn_resolutions=()")
SHORT = ("--config.batch_size=16", "--config.total_kimg=0.128", "--config.teacher.num_steps=3", "--config.run.log_every=1",
         "--config.run.probe_every=2", "--config.run.sample_every=4", "--config.run.eval_every=0", "--config.run.save_every=4",
         "--config.ema.halflife_kimg=(2.0,)", "--config.run.grid=10", "--config.run.probe_images=8", "--config.run.eval_images=100", "--config.run.batch_per_device=16")
TIMES = ("seconds", "images_per_second")


def command(config: str, workdir, *overrides: str) -> list[str]:
    """The arguments of sim_jax.main for 8 steps of 16 images; `config` such as "digits.py:tiny"; later overrides win."""
    # One flag per key: ml_collections would join the tuples of two.
    flags = {flag.split("=")[0]: flag for flag in (*NETWORK, *SHORT, *overrides)}
    return ["sim_jax.main", f"--config={ROOT / 'configs' / config}", f"--workdir={workdir}", *flags.values()]


def untrained_teacher(folder) -> pathlib.Path:
    """A directory of weights that fits the config digits.py of `command`, without training or compiling anything."""
    config, _, _ = main._parse(command("digits.py", "unused"))
    network = networks.build(config.network.to_dict())
    weights.save_directory(folder, tiny.random_params(network.shapes()), network.spec)
    return pathlib.Path(folder)


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
