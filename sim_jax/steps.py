"""One training iteration as a pure function: which network moves when, on which noise, and how its average follows.

    critic update     x0 = sg[G(z)] (or real images);  psi moves by the critic's loss (denoising score matching),
                      the discriminator's heads and the features that they read by the adversarial loss
    generator update  x0 = G(z);  theta moves by the objective's pair loss and the terms added to it, all else constant

The critic goes first, as in SiD's and Diff-Instruct's code. `jit`, donation and shardings are applied by the caller, once.

The generator's terms meet at the image: each term's gradient with respect to x0 is taken by itself, weighted, summed and pulled back
through the generator once. That costs no more than differentiating the sum, and says how hard each term pulls, which is what one needs
to know to weigh them.

Randomness: every sample has its own key, folded from (seed, iteration, purpose, index in the global batch). What a sample sees
depends on neither the number of devices nor how the batch is cut into micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sim_jax import draws, optim
from sim_jax.data.labels import condition
from sim_jax.diffusion import guidance
from sim_jax.merging import merged
from sim_jax.objectives import adversarial
from sim_jax.objectives.base import Nets, sum_chw
from sim_jax.recipe import Recipe, Role
from sim_jax.state import DistillState, TrainState
from sim_jax.types import Array, DenoiseFn, Key, Params

Metrics = dict[str, Array]
_CLEAN = 0.002  # the noise level at which features of clean images are taken: EDM's smallest (its networks take the logarithm)
MEMORY = "memory/"  # metrics that are not logged but handed to the objective's memory


def score_networks(recipe: Recipe, fake_params: Params, teacher_params: Params) -> tuple[DenoiseFn, DenoiseFn]:
    """(teacher, fake) as the objective sees them: whole parameters, guided where the recipe says so."""
    w = recipe.guidance
    teacher = recipe.teacher.bind(recipe.layout.gather(teacher_params))
    fake = recipe.fake_score.network.bind(recipe.layout.gather(fake_params))
    return (guidance.classifier_free(teacher, w=w.teacher, interval=w.interval, null_text=w.null_text),
            guidance.classifier_free(fake, w=w.fake_score, null_text=w.null_text))


def discriminator(recipe: Recipe, fake_params: Params, teacher_params: Params, heads: Params) -> Callable[..., Array] | None:
    """`discriminate(x_t, sigma, cond) -> logits [B, L]`; parameters whole."""
    if recipe.adversary is None:
        return None
    backbone = fake_params if recipe.adversary.features == "fake_score" else teacher_params
    return recipe.adversary.role.network.bind(backbone, heads)


def _mean(metrics: Metrics) -> Metrics:
    return {name: jnp.mean(value, axis=0) for name, value in metrics.items()}


def _gradient(recipe: Recipe, roles: Mapping[str, Role], loss: Callable[[Any, Any], tuple[Array, Metrics]], params: Mapping[str, Params],
              rows: Any) -> tuple[Metrics, dict[str, Params]]:
    """Loss, metrics and gradients averaged over the micro-batches of `rows`, a tree of per-sample arrays [B, ...]."""
    layout, pieces, group = recipe.layout, recipe.micro_batches, len(recipe.plan.sigmas)

    def piece(part):
        def mean_loss(whole):
            per_sample, metrics = loss(whole, part)
            return jnp.mean(per_sample), _mean(metrics)

        (value, metrics), grads = jax.value_and_grad(mean_loss, has_aux=True)(layout.gather(params))
        return {"loss": value, **metrics}, {name: layout.scatter(grads[name], role.shardings) for name, role in roles.items()}

    if pieces == 1:
        return piece(rows)

    # Consecutive groups of rows go to different pieces, so that every device finds its share of each piece among its own rows.
    def cut(a):
        return a.reshape(a.shape[0] // (pieces * group), pieces, group, *a.shape[1:])

    def take(a):
        return a.reshape(-1, *a.shape[2:])

    parts = jax.tree.map(cut, rows)
    if recipe.loop == "scan":
        def body(total, part):
            return jax.tree.map(jnp.add, total, piece(layout.split(jax.tree.map(take, part)))), None

        stacked = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), parts)
        first = jax.eval_shape(piece, jax.tree.map(lambda a: take(a[0]), stacked))
        total, _ = jax.lax.scan(body, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), first), stacked)
    else:
        total = None
        for i in range(pieces):
            out = piece(layout.split(jax.tree.map(lambda a: take(a[:, i]), parts)))
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


def _rows(recipe: Recipe, batch: Mapping[str, Any] | None) -> dict[str, Any]:
    """Per-sample arrays of an update: the index in the global batch, and what the data brings."""
    rows = {"index": recipe.layout.split(jnp.arange(recipe.batch_size, dtype=jnp.uint32))}
    if batch is not None and "image" in batch:
        rows |= {"image": batch["image"], "class": batch["label"]}
    if batch is not None and "text" in batch:
        rows |= {"text": batch["text"], "text_mask": batch["text_mask"]}
    return rows if batch is None or "pair" not in batch else {**rows, "pair": batch["pair"]}


def critic_update(recipe: Recipe, state: DistillState, teacher_params: Params | None, key: Key, batch: Mapping[str, Any] | None
                  ) -> tuple[DistillState, Metrics]:
    """Moves `fake_score` (and `discriminator`) on the generator's images; without a generator on the batch's.

    Args: as of `train_step`. Returns: the state with the critic's networks moved, and scalar metrics.
    """
    role, step, gan = recipe.fake_score, state.step, recipe.adversary
    critic_loss = recipe.objective.critic_loss or recipe.objective.pair_loss
    generator = None if state.generator is None else recipe.layout.gather(state.generator.params)
    teacher_params = None if gan is None else recipe.layout.gather(teacher_params)
    turn = "critic" if recipe.images == "fresh" else "generator"

    def loss(params, part):
        index = part["index"]
        if recipe.generator is None:
            x0, cond = part["image"], condition(part, recipe.label_dim)
        else:
            x0, cond = jax.lax.stop_gradient(draws.generate(recipe, generator, key, step, turn, part))
        noised, scored_cond = x0, cond
        if recipe.augment is not None:
            noised, augment_labels = recipe.augment(draws.sample_keys(key, step, "critic/augment", index), x0)
            scored_cond = cond._replace(augment_labels=augment_labels)
        scored = draws.noise(recipe, role.noise, key, step, "critic", index)
        dropout_keys = draws.dropout_keys(role, key, step, "critic/dropout", index)

        def judge(params):
            fake = role.network.bind(params["fake_score"], dropout_keys=dropout_keys)
            value, metrics = critic_loss(Nets(fake=fake), noised, *scored, scored_cond)
            if gan is None:
                return value, metrics
            discriminate = discriminator(recipe, params["fake_score"], teacher_params, params["discriminator"])
            (fake_noise, fake_level), (real_noise, real_level) = (
                draws.judged_noise(recipe, scored, role.noise, key, step, "critic", index, real=real) for real in (False, True))
            term, term_metrics = adversarial.discriminator_loss(
                discriminate, x0, part["image"], fake_noise, real_noise, fake_level, real_level, cond, condition(part, recipe.label_dim),
                clamp=gan.clamp)
            weight = gan.critic_weight if gan.critic_weighting is None else gan.critic_weight * gan.critic_weighting(fake_level.sigma)
            return value + weight * term, {**metrics, "denoising_loss": value, "discriminator/loss": term,
                                           **{f"discriminator/{name}": v for name, v in term_metrics.items()}}

        # The heads may read the fake score where its own loss does: one network then, with one backward pass.
        return (merged(judge) if gan is not None and gan.pairing != "own" and gan.features == "fake_score" else judge)(params)

    roles = {"fake_score": role} | ({} if gan is None else {"discriminator": gan.role})
    states = {name: getattr(state, name) for name in roles}
    metrics, grads = _gradient(recipe, roles, loss, {name: one.params for name, one in states.items()}, _rows(recipe, batch))
    metrics["grad_norm"] = optax.global_norm(grads["fake_score"])
    if gan is not None:
        metrics["discriminator/grad_norm"] = optax.global_norm(grads["discriminator"])
    moved = {name: _apply(recipe, roles[name], states[name], grads[name]) for name in roles}
    return state.replace(**moved), metrics


def image_gradient(term: Callable[[Array], tuple[Array, Metrics]], x0: Array) -> tuple[Array, Metrics, Array]:
    """Loss [B], metrics and d loss_i / d x0_i [B,H,W,C] of one term of the generator's loss."""

    def total(x):
        loss, metrics = term(x)
        return jnp.sum(loss), (loss, metrics)

    gradient, (loss, metrics) = jax.grad(total, has_aux=True)(jax.lax.stop_gradient(x0))
    return loss, metrics, gradient


def _length(gradient: Array) -> Array:
    return jnp.sqrt(sum_chw(jnp.square(gradient)))


def generator_update(recipe: Recipe, state: DistillState, teacher_params: Params, key: Key, batch: Mapping[str, Any] | None = None
                     ) -> tuple[DistillState, Metrics]:
    """Moves the generator by the objective's pair loss and the added terms; the other networks' parameters are constants.

    Args: as of `train_step`. Returns: the state with the generator (and the objective's memory) moved, and scalar metrics.
    """
    role, step, gan, gather = recipe.generator, state.step, recipe.adversary, recipe.layout.gather
    teacher, fake = score_networks(recipe, state.fake_score.params, teacher_params)
    discriminate = gan and discriminator(recipe, *(gather(p) for p in (state.fake_score.params, teacher_params, state.discriminator.params)))
    nets = Nets(teacher=teacher, fake=fake, discriminate=discriminate, memory=state.objective_state)
    once = merged if gan is not None and gan.pairing != "own" else lambda term: term  # logits and scores at the same x_t
    adversarial_weight = 0.0
    if gan is not None and gan.weight:
        begun = state.generator.step.astype(jnp.float32) * recipe.batch_size >= gan.start_images
        adversarial_weight = gan.weight * begun.astype(jnp.float32)

    def loss(params, part):
        index = part["index"]
        x0, cond = draws.generate(recipe, params["generator"], key, step, "generator", part)
        scored = draws.noise(recipe, role.noise, key, step, "generator", index)
        value, metrics, gradient = image_gradient(once(lambda x: recipe.objective.pair_loss(nets, x, *scored, cond)), x0)
        metrics = {**metrics, "image_gradient": _length(gradient)}
        if gan is not None and gan.weight:
            judged = draws.judged_noise(recipe, scored, role.noise, key, step, "generator", index, real=False)
            term, term_metrics, pull = image_gradient(
                once(lambda x: adversarial.generator_loss(discriminate, x, *judged, cond, clamp=gan.clamp)), x0)
            metrics |= {"gan_loss": term, "gan_image_gradient": _length(adversarial_weight * pull),
                        **{f"gan_{name}": v for name, v in term_metrics.items()}}
            value, gradient = value + adversarial_weight * term, gradient + adversarial_weight * pull
        # Worth `value`, with the gradient that the terms have at the image.
        value = value + sum_chw(jax.lax.stop_gradient(gradient) * (x0 - jax.lax.stop_gradient(x0)))
        if recipe.regression is not None:
            term, term_metrics = _regression(recipe, params["generator"], teacher_params, part["pair"])
            value, metrics = value + recipe.regression.weight * term, metrics | {"regression_loss": term} | term_metrics
        return value, metrics

    metrics, grads = _gradient(recipe, {"generator": role}, loss, {"generator": state.generator.params}, _rows(recipe, batch))
    metrics["grad_norm"] = optax.global_norm(grads["generator"])
    if "gan_image_gradient" in metrics:
        metrics["gan_gradient_ratio"] = metrics["gan_image_gradient"] / jnp.maximum(metrics["image_gradient"], 1e-20)
    memory = {name.removeprefix(MEMORY): metrics.pop(name) for name in sorted(metrics) if name.startswith(MEMORY)}
    new = state.replace(generator=_apply(recipe, role, state.generator, grads["generator"]))
    if recipe.objective.update_memory is not None:
        new = new.replace(objective_state=recipe.objective.update_memory(state.objective_state, memory))
    return new, metrics


def _regression(recipe: Recipe, params: Params, teacher_params: Params, pair: Mapping[str, Array]) -> tuple[Array, Metrics]:
    """The generator's one-step images of the pairs' noise against the teacher's samples from it."""
    cond = condition({**pair, "class": pair["label"]}, recipe.label_dim)
    z = recipe.layout.split(recipe.regression.noise(pair["index"]))
    told = jnp.full(z.shape[:1], recipe.plan.told(0), z.dtype)
    x0 = recipe.generator.network.bind(params)(recipe.plan.sigmas[0] * z, told, cond)
    clean = jnp.full(z.shape[:1], max(recipe.teacher.precond.sigma_min, _CLEAN), z.dtype)
    return recipe.regression.loss(x0, pair["image"], features=lambda x: recipe.teacher.features(
        recipe.layout.gather(teacher_params), x, clean, cond, resolutions=recipe.regression.resolutions))


def train_step(recipe: Recipe, state: DistillState, teacher_params: Params | None, key: Key, batch: Mapping[str, Any] | None = None,
               *, update_critic: bool = True, update_generator: bool = True) -> tuple[DistillState, Metrics]:
    """One iteration: the critic, then (where it is the generator's turn) the generator against the moved critic.

    Args:
      recipe: static.
      state: donated by the caller.
      teacher_params: not donated, constant.
      key: the run's key; the iteration's keys are folded from it and `state.step`.
      batch: {"image": [B,H,W,C] in [-1, 1], "label": [B] int32} where the method needs data, {"pair": {"index", "image", "label"}} where
        it needs the teacher's pairs, and {"text": [B,L,D], "text_mask": [B,L]}, captions of the images and of what is generated.
      update_critic, update_generator: static; which of the two move.
    Returns: the next state and scalar metrics, named "role/name".
    """
    metrics = {}
    new = state
    if update_critic:
        new, critic_metrics = critic_update(recipe, new, teacher_params, key, batch)
        critic = "denoiser" if recipe.generator is None else "fake_score"
        metrics |= {name if name.startswith("discriminator/") else f"{critic}/{name}": v for name, v in critic_metrics.items()}
    if recipe.generator is not None and update_generator:
        new, generator_metrics = generator_update(recipe, new, teacher_params, key, batch)
        metrics |= {f"generator/{name}": value for name, value in generator_metrics.items()}
    return new.replace(step=state.step + 1), metrics
