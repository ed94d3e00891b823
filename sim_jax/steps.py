"""One training iteration as a pure function: which network moves when, on which noise, and how its average follows.

    critic update     x0 = sg[G(z)] (or real images);  psi moves by the critic's loss (denoising score matching)
    generator update  x0 = G(z) with fresh z;          theta moves by the objective's pair loss, psi and the teacher constant

The critic goes first, as in SiD's and Diff-Instruct's code. `jit`, donation and shardings are applied by the caller, once.

Randomness: every sample has its own key, folded from (seed, iteration, purpose, index in the global batch). What a sample sees
depends on neither the number of devices nor how the batch is cut into micro-batches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sim_jax import optim, randomness
from sim_jax.data.labels import one_hot
from sim_jax.diffusion import samplers
from sim_jax.networks import Network
from sim_jax.objectives.base import Nets, Objective
from sim_jax.randomness import normal
from sim_jax.sharding import Layout
from sim_jax.state import DistillState, TrainState
from sim_jax.types import Array, Cond, Key, NoiseLevel, Params

Metrics = dict[str, Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Role:
    """How one trained network moves.

    Attributes:
      network: as functions of its parameters.
      optimizer: its optax chain.
      noise: per-sample keys [B] -> NoiseLevel, the levels that its loss is taken at.
      shardings: of its parameters, None on one device.
    """

    network: Network
    optimizer: optax.GradientTransformation
    noise: Callable[[Key], NoiseLevel]
    shardings: Params | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything static of an iteration.

    Attributes:
      objective: pair and critic losses.
      generator: None where a teacher is trained.
      fake_score: the critic, or the teacher in training.
      teacher: None where a teacher is trained.
      labels: (keys [B], index [B]) -> class [B] int32; unused where data brings labels.
      augment: (keys [B], images) -> (images, labels [B, augment_dim]), for the critic's images; None does nothing.
      batch_size: images per update, over all devices.
      micro_batches: how many pieces an update's batch is cut into.
      loop: "python" unrolls the pieces, "scan" compiles one (convolutions in loops are slow on CPUs).
      sigma_init: the generator's noise level, G(z) = D(sigma_init z; sigma_init).
      ema: `halflife_kimg` and `rampup` of `optim.update_ema`.
      layout: where the arrays lie.
    """

    objective: Objective
    fake_score: Role
    generator: Role | None = None
    teacher: Network | None = None
    labels: Callable[[Key, Array], Array] | None = None
    augment: Callable[[Key, Array], tuple[Array, Array]] | None = None
    batch_size: int
    micro_batches: int = 1
    loop: str = "python"
    sigma_init: float = 2.5
    ema: Mapping[str, Any]
    layout: Layout = Layout()

    @property
    def label_dim(self) -> int:
        return self.fake_score.network.label_dim


def sample_keys(key: Key, step: Array, purpose: str, index: Array) -> Key:
    """Keys [B] for samples `index` [B] of iteration `step`, independent between purposes."""
    return randomness.sample_keys(jax.random.fold_in(key, step), purpose, index)


def generate(network: Network, params: Params, z: Array, cond: Cond, *, sigma_init: float, dropout_keys: Key | None = None) -> Array:
    """The one-step generator, x = D(sigma_init z; sigma_init)."""
    return samplers.one_step(network.bind(params, dropout_keys=dropout_keys), z, cond, sigma_init=sigma_init)


def _latents(recipe: Recipe, key: Key, step: Array, turn: str, index: Array) -> tuple[Array, Cond, Array]:
    """z [B,H,W,C], the condition and the classes of one turn's batch."""
    keys = sample_keys(key, step, f"{turn}/z", index)
    z = recipe.layout.split(normal(keys, recipe.fake_score.network.image_shape))
    labels = recipe.labels(sample_keys(key, step, f"{turn}/label", index), index)
    return z, Cond(class_labels=one_hot(labels, recipe.label_dim)), labels


def _dropout_keys(role: Role, key: Key, step: Array, purpose: str, index: Array) -> Key | None:
    spec = role.network.spec
    rates = [spec[name] for name in ("dropout", "label_dropout") if name in spec]
    return sample_keys(key, step, purpose, index) if any(rates) else None


def _noise(recipe: Recipe, role: Role, key: Key, step: Array, turn: str, index: Array) -> tuple[Array, NoiseLevel]:
    noise = normal(sample_keys(key, step, f"{turn}/noise", index), role.network.image_shape)
    return recipe.layout.split(noise), recipe.layout.split(role.noise(sample_keys(key, step, f"{turn}/level", index)))


def _mean(tree: Any) -> Any:
    return jax.tree.map(jnp.mean, tree)


def _gradient(recipe: Recipe, role: Role, loss: Callable[[Params, Any], tuple[Array, Metrics]], params: Params,
              rows: Any) -> tuple[Metrics, Params]:
    """Loss, metrics and gradient averaged over the micro-batches of `rows`, a tree of per-sample arrays [B, ...]."""
    layout, pieces = recipe.layout, recipe.micro_batches

    def piece(part):
        def mean_loss(whole):
            per_sample, metrics = loss(whole, part)
            return jnp.mean(per_sample), _mean(metrics)

        (value, metrics), grads = jax.value_and_grad(mean_loss, has_aux=True)(layout.gather(params))
        return {"loss": value, **metrics}, layout.scatter(grads, role.shardings)

    # Consecutive rows go to different pieces, so that every device finds its share of each piece among its own rows.
    parts = jax.tree.map(lambda a: a.reshape(a.shape[0] // pieces, pieces, *a.shape[1:]), rows)
    if pieces == 1:
        return piece(jax.tree.map(lambda a: a[:, 0], parts))
    if recipe.loop == "scan":
        def body(total, part):
            return jax.tree.map(jnp.add, total, piece(layout.split(part))), None

        stacked = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), parts)
        first = jax.eval_shape(piece, jax.tree.map(lambda a: a[0], stacked))
        total, _ = jax.lax.scan(body, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), first), stacked)
    else:
        total = None
        for i in range(pieces):
            out = piece(layout.split(jax.tree.map(lambda a: a[:, i], parts)))
            total = out if total is None else jax.tree.map(jnp.add, total, out)
    return jax.tree.map(lambda a: a / pieces, total)


def _apply(recipe: Recipe, role: Role, state: TrainState, grads: Params) -> TrainState:
    """One optimiser step, and the averages that this network keeps."""
    updates, opt_state = role.optimizer.update(grads, state.opt_state, state.params)
    params = role.network.project(optax.apply_updates(state.params, updates))
    ema = state.ema
    if ema:
        seen = state.step.astype(jnp.float32) * recipe.batch_size
        ema = optim.update_ema(ema, params, seen, recipe.batch_size, **recipe.ema)
    return TrainState(step=state.step + 1, params=params, opt_state=opt_state, ema=ema)


def critic_update(recipe: Recipe, state: DistillState, key: Key, images: Array | None, classes: Array | None
                  ) -> tuple[TrainState, Metrics]:
    """Moves `fake_score` on the generator's images, or on `images` [B,H,W,C] with `classes` [B] where they are given."""
    role, step = recipe.fake_score, state.step
    critic_loss = recipe.objective.critic_loss or recipe.objective.pair_loss
    rows = {"index": recipe.layout.split(jnp.arange(recipe.batch_size, dtype=jnp.uint32))}
    if images is not None:
        rows |= {"image": images, "class": classes}
    generator = None if state.generator is None else recipe.layout.gather(state.generator.params)

    def loss(params, part):
        index = part["index"]
        if images is None:
            z, cond, _ = _latents(recipe, key, step, "critic", index)
            dropout_keys = _dropout_keys(recipe.generator, key, step, "critic/generator_dropout", index)
            x0 = generate(recipe.generator.network, generator, z, cond, sigma_init=recipe.sigma_init, dropout_keys=dropout_keys)
            x0 = jax.lax.stop_gradient(x0)
        else:
            x0, cond = part["image"], Cond(class_labels=one_hot(part["class"], recipe.label_dim))
        if recipe.augment is not None:
            x0, augment_labels = recipe.augment(sample_keys(key, step, "critic/augment", index), x0)
            cond = cond._replace(augment_labels=augment_labels)
        noise, level = _noise(recipe, role, key, step, "critic", index)
        fake = role.network.bind(params, dropout_keys=_dropout_keys(role, key, step, "critic/dropout", index))
        return critic_loss(Nets(fake=fake), x0, noise, level, cond)

    metrics, grads = _gradient(recipe, role, loss, state.fake_score.params, rows)
    return _apply(recipe, role, state.fake_score, grads), {**metrics, "grad_norm": optax.global_norm(grads)}


def generator_update(recipe: Recipe, state: DistillState, teacher_params: Params, key: Key) -> tuple[TrainState, Metrics]:
    """Moves the generator by the objective's pair loss; the other networks' parameters are constants."""
    role, step, gather = recipe.generator, state.step, recipe.layout.gather
    fake = recipe.fake_score.network.bind(gather(state.fake_score.params))
    teacher = recipe.teacher.bind(gather(teacher_params))

    def loss(params, part):
        index = part["index"]
        z, cond, _ = _latents(recipe, key, step, "generator", index)
        dropout_keys = _dropout_keys(role, key, step, "generator/dropout", index)
        x0 = generate(role.network, params, z, cond, sigma_init=recipe.sigma_init, dropout_keys=dropout_keys)
        noise, level = _noise(recipe, role, key, step, "generator", index)
        return recipe.objective.pair_loss(Nets(teacher=teacher, fake=fake), x0, noise, level, cond)

    rows = {"index": recipe.layout.split(jnp.arange(recipe.batch_size, dtype=jnp.uint32))}
    metrics, grads = _gradient(recipe, role, loss, state.generator.params, rows)
    return _apply(recipe, role, state.generator, grads), {**metrics, "grad_norm": optax.global_norm(grads)}


def train_step(recipe: Recipe, state: DistillState, teacher_params: Params | None, key: Key, batch: Mapping[str, Array] | None = None,
               *, update_generator: bool = True) -> tuple[DistillState, Metrics]:
    """One iteration: the critic, then (where it is the generator's turn) the generator against the moved critic.

    Args:
      recipe: static.
      state: donated by the caller.
      teacher_params: not donated, constant.
      key: the run's key; the iteration's keys are folded from it and `state.step`.
      batch: {"image": [B,H,W,C] in [-1, 1], "label": [B] int32} where the method needs data.
      update_generator: static; False on the iterations that only the critic takes.
    Returns: the next state and scalar metrics, named "role/name".
    """
    images, classes = (None, None) if batch is None else (batch["image"], batch["label"])
    fake_score, critic_metrics = critic_update(recipe, state, key, images, classes)
    critic_name = "denoiser" if recipe.generator is None else "fake_score"
    metrics = {f"{critic_name}/{name}": value for name, value in critic_metrics.items()}
    new = state.replace(fake_score=fake_score)
    if recipe.generator is not None and update_generator:
        generator, generator_metrics = generator_update(recipe, new, teacher_params, key)
        metrics |= {f"generator/{name}": value for name, value in generator_metrics.items()}
        new = new.replace(generator=generator)
    return new.replace(step=state.step + 1), metrics
