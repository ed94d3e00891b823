"""Whole runs on a tiny network, as a user starts them: what the end-to-end tests share."""

from __future__ import annotations

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

import tiny
from sim_jax import main, networks, weights
from sim_jax.types import Cond

ROOT = pathlib.Path(__file__).resolve().parents[1]
NETWORK = ("--config.network.model_channels=8", "--config.network.channel_mult=(1,)", "--config.network.attn_resolutions=()")
SHORT = ("--config.batch_size=16", "--config.total_kimg=0.128", "--config.teacher.num_steps=3", "--config.run.log_every=1",
         "--config.run.probe_every=2", "--config.run.sample_every=4", "--config.run.eval_every=0", "--config.run.save_every=4",
         "--config.ema.halflife_kimg=(2.0,)", "--config.run.grid=10", "--config.run.probe_images=8", "--config.run.eval_images=100",
         "--config.run.batch_per_device=16")
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


class PixelNetwork(networks.Network):
    """A network with one hidden layer over all pixels in place of the described one: traced and compiled in a moment."""

    def init(self, key):
        pixels, labels = math.prod(self.image_shape), self.label_dim + self.augment_dim
        shapes = {"enc": (pixels, 16), "map_label": (labels, 16), "dec": (16, pixels)}
        keys = jax.random.split(key, len(shapes))
        return {name: {"weight": jax.random.normal(k, shape) / shape[0] ** 0.5} for k, (name, shape) in zip(keys, shapes.items())}

    def feature_shapes(self, resolutions=()):
        return [(1, 1, 16)]

    def features(self, params, x, sigma, cond=Cond(), *, resolutions=(), dropout_keys=None):
        flat = x.reshape(x.shape[0], -1) / jnp.sqrt(sigma[:, None] ** 2 + 0.25)
        return [(jnp.log(sigma)[:, None] * jnp.tanh(flat @ params["enc"]["weight"]))[:, None, None]]

    def denoise(self, params, x, sigma, cond=Cond(), *, dropout_keys=None):
        flat, s = x.reshape(x.shape[0], -1), sigma[:, None]
        labels = [cond.class_labels, jnp.zeros((len(x), self.augment_dim)) if cond.augment_labels is None else cond.augment_labels]
        hidden = flat / jnp.sqrt(s**2 + 0.25) @ params["enc"]["weight"] + jnp.concatenate(labels, 1) @ params["map_label"]["weight"]
        hidden = jnp.tanh(hidden)
        if dropout_keys is not None:
            hidden *= jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.spec["dropout"], (16,)))(dropout_keys)
        return (flat * 0.25 / (s**2 + 0.25) + s * 0.5 / jnp.sqrt(s**2 + 0.25) * (hidden @ params["dec"]["weight"])).reshape(x.shape)


def use_pixel_networks(monkeypatch) -> None:
    """Every network built from now on is a PixelNetwork."""
    build = networks.build
    monkeypatch.setattr(networks, "build", lambda *args, **knobs: PixelNetwork(**vars(build(*args, **knobs))))


def saved_state(workdir, step: int) -> dict[str, np.ndarray]:
    """Everything in a checkpoint, {path: array}."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        folder = pathlib.Path(workdir).absolute() / "checkpoints" / str(step) / "state"
        kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), dict(reader.metadata(folder).item_metadata.tree))
        tree = reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=kinds))
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}
