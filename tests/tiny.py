"""Small networks, recipes and states shared by the tests of the core."""

from __future__ import annotations

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from sim_jax import networks, objectives, optim, sharding, steps
from sim_jax.data import labels
from sim_jax.diffusion import noise_levels, preconditioners
from sim_jax.state import DistillState, TrainState
from sim_jax.types import Cond

SPEC = {
    "precond": "EDMPrecond", "model_type": "SongUNet", "img_resolution": 8, "img_channels": 1, "label_dim": 3, "model_channels": 16,
    "channel_mult": (1,), "num_blocks": 1, "attn_resolutions": (), "dropout": 0.0,
}


def network(*, dtype: str = "float32", remat: str = "none", **changes) -> networks.Network:
    return networks.build({**SPEC, **changes}, dtype=dtype, remat=remat)


def random_params(shapes, seed: int = 0):
    """A tree in which nothing is zero: EDM starts its last layers at (nearly) zero, which would hide mistakes before them."""
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        noise = rng.standard_normal(leaf.shape)
        name = path[-1].key
        if name == "weight" and len(leaf.shape) == 1:
            return np.float32(1 + 0.1 * noise)
        return np.float32(noise / np.sqrt(max(np.prod(leaf.shape[:-1]), 1)) if name == "weight" else 0.1 * noise)

    return jax.tree_util.tree_map_with_path(one, shapes)


@dataclasses.dataclass(frozen=True, eq=False)
class PixelNet:
    """A denoiser with one hidden layer over all pixels and a Network's interface: compiles in a moment, works in any float type."""

    size: int = 4
    hidden: int = 64
    label_dim: int = 3
    dropout: float = 0.0
    augment_dim: int = 0

    @property
    def spec(self) -> dict:
        return {"dropout": self.dropout, "label_dropout": 0.0}

    text_dim = text_tokens = 0

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (self.size, self.size, 1)

    @property
    def precond(self) -> preconditioners.Preconditioner:
        return preconditioners.edm()

    def shapes(self):
        n = self.size**2
        shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)  # noqa: E731
        return {"enc": {"weight": shape(n, self.hidden), "bias": shape(self.hidden)}, "map_label": {"weight": shape(3, self.hidden)},
                "dec": {"weight": shape(self.hidden, n), "bias": shape(n)}}

    def project(self, params):
        return params

    def bind(self, params, *, dropout_keys=None):
        def denoise(x, sigma, cond: Cond):
            flat, s = x.reshape(x.shape[0], -1), sigma[:, None]
            h = jnp.tanh(flat / jnp.sqrt(s**2 + 0.25) @ params["enc"]["weight"] + params["enc"]["bias"][None] * jnp.log(s)
                         + cond.class_labels @ params["map_label"]["weight"])
            if dropout_keys is not None:
                keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.dropout, (self.hidden,)))(dropout_keys)
                h = jnp.where(keep, h / (1 - self.dropout), 0)
            raw = h @ params["dec"]["weight"] + params["dec"]["bias"][None]
            return (flat * 0.25 / (s**2 + 0.25) + s * 0.5 / jnp.sqrt(s**2 + 0.25) * raw).reshape(x.shape)

        return denoise


def recipe(net, *, method: str = "sim", lr: float = 1e-3, optimizer=None, layout=None, shardings=None, **changes) -> steps.Recipe:
    """SIM (or dsm) on `net` in every role."""
    def role(noise, where):
        moves = optimizer or optim.make_optimizer(lr=lr, eps=1e-8)
        return steps.Role(network=net, optimizer=moves, noise=noise, shardings=where)

    distils = method != "dsm"
    defaults = dict(
        objective=objectives.get(method),
        fake_score=role(noise_levels.make("log_normal"), shardings and shardings.fake_score.params),
        generator=role(noise_levels.make("karras", u_min=0.2, u_max=0.8), shardings and shardings.generator.params) if distils else None,
        teacher=net if distils else None, labels=labels.make("uniform", net.label_dim), batch_size=8,
        ema=dict(halflife_kimg=(0.02,), rampup=0.0), layout=layout or sharding.Layout())
    return steps.Recipe(**{**defaults, **changes})


def host_state(made: steps.Recipe) -> DistillState:
    """Numpy arrays, generator and fake score apart, averages apart from both."""
    def one(role, seed, averaged):
        params = random_params(role.network.shapes(), seed)
        names = optim.ema_names(made.ema["halflife_kimg"]) if averaged else ()
        return TrainState(step=np.int32(0), params=params, opt_state=jax.tree.map(np.asarray, role.optimizer.init(params)),
                          ema={name: jax.tree.map(lambda p: p + np.float32(0.01), params) for name in names})

    return DistillState(
        step=np.int32(0), generator=one(made.generator, 1, True) if made.generator else None,
        fake_score=one(made.fake_score, 2, made.generator is None))


def placed(net, *, devices: int, mesh: str = "data:-1", rules=((".*", "replicate"),), **kwargs):
    """A recipe on some devices, its state, the teacher's parameters, and the jitted step as `train` jits it."""
    layout = sharding.Layout(sharding.make_mesh(mesh, devices=jax.devices()[:devices]))
    state = host_state(recipe(net, **kwargs))
    shardings = sharding.tree_shardings(state, layout.mesh, rules)
    made = recipe(net, layout=layout, shardings=shardings, **kwargs)
    teacher = random_params(net.shapes(), 3)
    teacher = sharding.place(teacher, sharding.tree_shardings(teacher, layout.mesh, ((".*", "replicate"),)))
    step = jax.jit(functools.partial(steps.train_step, made), donate_argnums=0, static_argnames=("update_critic", "update_generator"),
                   out_shardings=(shardings, layout.replicated))
    return made, sharding.place(state, shardings), teacher, step


def run(step, state, teacher, *, count: int, batches=None, key=None):
    """`count` iterations, waiting for each as `train` does on CPUs."""
    key = jax.random.key(7) if key is None else key
    metrics = None
    for i in range(count):
        state, metrics = jax.block_until_ready(step(state, teacher, key, None if batches is None else batches[i]))
    return sharding.to_host(state), {name: float(value) for name, value in metrics.items()}


def sample_key(key, *folds: int | str):
    """The documented derivation of a sample's key, written out: fold in numbers, and names by their CRC-32."""
    for fold in folds:
        key = jax.random.fold_in(key, zlib.crc32(fold.encode()) if isinstance(fold, str) else fold)
    return key


def difference(a, b) -> float:
    """Largest relative distance in norm between two trees' leaves."""
    def one(x, y):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        return float(np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-30)) if x.size else 0.0

    return max(jax.tree.leaves(jax.tree.map(one, a, b)))
