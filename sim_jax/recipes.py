"""From a config's sections to a `Recipe`: roles, terms, and how the batch is cut. Raises ValueError for what cannot be."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sim_jax import load, networks, objectives, optim, pairs
from sim_jax.data import augment, labels
from sim_jax.data.captions import Captions
from sim_jax.diffusion import noise_levels
from sim_jax.diffusion.samplers import FewStep
from sim_jax.discriminator import Discriminator
from sim_jax.objectives import regression, weights
from sim_jax.recipe import Adversary, Guidance, Levels, Recipe, Regression, Role
from sim_jax.sharding import Layout


def make(config: ConfigDict, objective: objectives.Objective, requirements: frozenset[str], spec: Mapping[str, Any],
         teacher: load.Loaded | None, mesh: Mesh, captions: Captions | None = None) -> tuple[Recipe, int, int]:
    """The recipe, without shardings, and the iterations before the generator's first turn and of the whole run.

    Args:
      config: checked by `config_checks`.
      objective: its method.
      requirements: as from `needs`.
      spec: of the trained networks.
      teacher: None where one is trained.
      mesh: the devices.
      captions: of training; None without text, or where only shapes matter.
    Raises: ValueError naming the key, what came and what is allowed.
    """
    distils = teacher is not None
    few_step = plan(config)
    start_steps = math.ceil(config.generator.start_kimg * 1000 / config.batch_size) if distils else 0
    updates = max(math.ceil(config.total_kimg * 1000 / config.batch_size), 1)
    total_steps = start_steps + updates * (config.fake_score.updates if distils else 1)
    fake_score = role(config.fake_score, "fake_score", spec, total_steps, drop_labels=not distils or config.fake_score.guidance != 1)
    generator = role(config.generator, "generator", spec, updates, drop_labels=False) if distils else None
    recipe = Recipe(
        objective=objective, fake_score=fake_score, generator=generator,
        teacher=teacher_network(config, teacher) if distils else None,
        adversary=adversary(config, requirements, fake_score.network, teacher, total_steps), regression=regression_term(config, teacher),
        guidance=guidance(config, teacher, captions), labels=labels.make(config.labels.scheme, spec["label_dim"], histogram=histogram(config)),
        augment=augmentation(config, fake_score.network), batch_size=config.batch_size,
        micro_batches=micro_batches(config, mesh.size, len(few_step.sigmas)), loop="python" if mesh.devices.flat[0].platform == "cpu" else "scan",
        plan=few_step, inputs=config.generator.inputs, images=config.fake_score.images,
        ema=dict(halflife_kimg=tuple(config.ema.halflife_kimg), rampup=config.ema.rampup), layout=Layout(mesh))
    return recipe, start_steps, total_steps


def given(section: ConfigDict) -> dict[str, Any]:
    """A section without the keys that are None."""
    return {k: v for k, v in section.to_dict().items() if v is not None}


def histogram(config: ConfigDict) -> tuple[float, ...] | None:
    """Class weights, where labels are drawn by them."""
    return tuple(config.labels.histogram) or None


def is_analytic(spec: Mapping[str, Any]) -> bool:
    """Whether a teacher is a formula, which no network can start from."""
    return spec["precond"] == "Analytic"


def needs(config: ConfigDict, objective: objectives.Objective) -> frozenset[str]:
    """What the run needs: the method's needs, and those of the terms that the config adds."""
    needs = set(objective.needs)
    if config.method == "dsm":
        for key in ("gan.weight", "regression.weight"):
            if config[key.split(".")[0]].weight:
                raise ValueError(f"{key}: got {config[key.split('.')[0]].weight:g}, allowed with method 'dsm': 0")
        return frozenset(needs)
    if "pairs" in needs and not config.regression.weight:
        raise ValueError(f"regression.weight: got 0, allowed with method {config.method!r}: above 0")
    if config.gan.weight or "discriminator" in needs:
        needs |= {"discriminator", "data"}
    if config.generator.inputs == "data" and config.generator.sigmas:
        needs |= {"data"}
    return frozenset(needs)


def plan(config: ConfigDict) -> FewStep:
    """The generator's noise levels."""
    section = config.generator
    try:
        return FewStep(tuple(section.sigmas) or (section.sigma_init,), section.sigma_cond)
    except ValueError as error:
        raise ValueError(f"generator.{error}") from None


def micro_batches(config: ConfigDict, num_devices: int, calls: int) -> int:
    """Into how many pieces an update's batch is cut: every device holds whole groups of `calls` samples of each piece."""
    batch, limit, unit = config.batch_size, config.max_batch_per_device, num_devices * calls
    if batch % unit:
        below, above = batch // unit * unit, -(-batch // unit) * unit
        kind = f" with a generator of {calls} steps" if calls > 1 else ""
        raise ValueError(f"batch_size: got {batch} on {num_devices} devices{kind}, allowed: a multiple of {unit}, "
                         f"such as {below or above} or {above}")
    groups = batch // unit
    if not limit or limit >= groups * calls:
        return 1
    if limit < calls:
        raise ValueError(f"max_batch_per_device: got {limit} with a generator of {calls} steps, allowed: {calls} or more")
    return next(n for n in range(-(-groups * calls // limit), groups + 1) if groups % n == 0)


def role(section: ConfigDict, name: str, spec: Mapping[str, Any], total_steps: int, *, drop_labels: bool) -> Role:
    if not drop_labels and "label_dropout" in spec:
        spec = {**spec, "label_dropout": 0.0}  # the teacher's classifier-free training is not the students'
    try:
        return Role(network=networks.build(spec, dtype=section.dtype, remat=section.remat, dropout=section.dropout),
                    optimizer=optim.make_optimizer(**given(section.optimizer), total_steps=max(total_steps, 1)),
                    noise=levels(section.noise))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def teacher_network(config: ConfigDict, teacher: load.Loaded) -> networks.Network:
    """The teacher as the losses call it."""
    try:
        return networks.build(teacher.network.spec, dtype=config.teacher.dtype, remat=config.teacher.remat)
    except ValueError as error:
        raise ValueError(f"teacher.{error}") from None


def levels(section: ConfigDict) -> Levels:
    """Of a config's `noise` section."""
    noise = given(section)
    return noise_levels.make(noise.pop("name"), **noise)


def adversary(config: ConfigDict, needs: frozenset[str], fake_score: networks.Network, teacher: load.Loaded | None, total_steps: int
               ) -> Adversary | None:
    if "discriminator" not in needs:
        return None
    section = config.gan
    backbone = fake_score if section.features == "fake_score" else teacher_network(config, teacher)
    heads = Discriminator(backbone, tuple(section.resolutions), section.head)
    try:
        weighting = weights.get_denoising(section.critic_weighting, sigma_data=backbone.spec.get("sigma_data", 0.5))
        role = Role(network=heads, noise=levels(section.noise),
                    optimizer=optim.make_optimizer(**given(section.optimizer), total_steps=max(total_steps, 1)))
    except ValueError as error:
        raise ValueError(f"gan: {error}") from None
    return Adversary(role=role, features=section.features, weight=section.weight, critic_weight=section.critic_weight,
                     critic_weighting=None if section.critic_weighting == "none" else weighting,
                     pairing=section.pairing, clamp=section.clamp, start_images=section.start_kimg * 1000)


def regression_term(config: ConfigDict, teacher: load.Loaded | None) -> Regression | None:
    section = config.regression
    if teacher is None or not section.weight:
        return None
    try:
        regression.check(distance=section.distance)
    except ValueError as error:
        raise ValueError(f"regression.{error}") from None
    spec = teacher.network.spec
    levels = range(len(spec["channel_mult"])) if "channel_mult" in spec else range(1)
    return Regression(weight=section.weight, loss=functools.partial(regression.regression_loss, distance=section.distance),
                      noise=functools.partial(pairs.noise, seed=config.seed, image_shape=teacher.network.image_shape),
                      resolutions=tuple(spec["img_resolution"] >> level for level in levels))


def guidance(config: ConfigDict, teacher: load.Loaded | None, captions: Captions | None) -> Guidance:
    """Raises ValueError for guidance of networks that never saw images without their class."""
    interval = tuple(config.teacher.guidance_interval)
    if interval and not (len(interval) == 2 and 0 <= interval[0] < interval[1]):
        raise ValueError(f"teacher.guidance_interval: got {interval}, allowed: (sigma_lo, sigma_hi) or ()")
    for key, w in (("teacher.guidance", config.teacher.guidance), ("fake_score.guidance", config.fake_score.guidance)):
        spec = None if teacher is None else teacher.network.spec
        conditional = teacher is not None and (teacher.network.label_dim or teacher.network.text_dim)
        trained = conditional and (is_analytic(spec) or spec.get("label_dropout", 1) > 0)
        if w != 1 and not trained:
            raise ValueError(f"{key}: got {w:g}, allowed: 1, or with a class- or text-conditional teacher trained with label dropout")
    return Guidance(teacher=config.teacher.guidance, fake_score=config.fake_score.guidance, interval=interval or None,
                    null_text=_null_text(config, teacher, captions))


def _null_text(config: ConfigDict, teacher: load.Loaded | None, captions: Captions | None) -> np.ndarray | None:
    """The encoder's states of the empty prompt, for guidance of networks without a null caption of their own."""
    guided = config.teacher.guidance != 1 or config.fake_score.guidance != 1
    if teacher is None or not guided or not teacher.network.text_dim or teacher.network.text_tokens:
        return None
    if captions is not None and captions.null is None:
        raise ValueError(f"text.path: got captions without the empty prompt ({captions.encoder}), which guidance of a network without a null "
                         "caption needs; allowed: a directory that sim_jax.data.embed_prompts wrote")
    return np.zeros((1, 1, teacher.network.text_dim), np.float32) if captions is None else captions.null


def augmentation(config: ConfigDict, network: networks.Network):
    p = config.fake_score.augment_p
    if not p:
        return None
    if network.augment_dim != augment.LABEL_DIM:
        raise ValueError(f"fake_score.augment_p: got {p} for a network with augment_dim {network.augment_dim}, "
                         f"allowed: 0, or a network with augment_dim {augment.LABEL_DIM}")
    return lambda keys, images: augment.augment(keys, images, p=p)
