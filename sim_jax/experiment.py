"""From a config to everything static of a run: the one place that reads the config's sections, for every entry point.

`build` checks all of it, and raises ValueError naming the key before anything is compiled or written.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from sim_jax import config_checks, load, networks, objectives, optim, randomness, sharding, steps
from sim_jax.data import augment, labels, make_source
from sim_jax.data.source import Source
from sim_jax.diffusion import noise_levels
from sim_jax.evals.generate import Latents
from sim_jax.sharding import Layout
from sim_jax.state import DistillState, TrainState
from sim_jax.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Experiment:
    """A checked config.

    Attributes:
      config: as given.
      recipe: the training iteration's static half.
      teacher: network, host parameters and origin; None where a teacher is trained.
      source: real images, None in a data-free run.
      shapes, shardings: of the DistillState.
      teacher_shardings: of the teacher's parameters.
      total_steps: iterations of the whole run.
    """

    config: ConfigDict
    recipe: steps.Recipe
    teacher: load.Loaded | None
    source: Source | None
    shapes: DistillState
    shardings: DistillState
    teacher_shardings: Params | None
    total_steps: int

    @property
    def layout(self) -> Layout:
        return self.recipe.layout

    @property
    def distils(self) -> bool:
        return self.recipe.generator is not None

    @property
    def trained(self) -> steps.Role:
        """The network that the run is for."""
        return self.recipe.generator if self.distils else self.recipe.fake_score

    def updates_generator(self, step: int) -> bool:
        """Whether iteration `step` (from 0) moves the generator."""
        return self.distils and (step + 1) % self.config.fake_score.updates == 0

    def latents(self) -> Latents:
        """Where samples start: noise and classes by (seed, index)."""
        network = self.trained.network
        return Latents(network.image_shape, network.label_dim, self.config.labels.scheme, _histogram(self.config))


def build(config: ConfigDict, *, devices: Sequence[Any] | None = None, with_data: bool = True, with_weights: bool = True) -> Experiment:
    """Checks a config and builds what it describes; allocates no training state.

    Args:
      config: as from configs/common.py.
      devices: default all.
      with_data: False leaves the data set unopened, for planning and shape checks.
      with_weights: False takes shapes for the teacher's weights, those of `config.network`, and reads no file.
    Raises: ValueError for anything wrong: one line with the key, what came and what is allowed.
    """
    config_checks.check(config.to_dict())
    objective = objectives.get(config.method, critic=None if config.method == "dsm" else _given(config.fake_score.loss),
                               **_given(config.objective))
    mesh = sharding.make_mesh(config.sharding.mesh, devices=devices)
    for rules in (config.sharding.rules, config.sharding.teacher_rules):
        sharding.check_rules(rules, mesh)
    pieces = _micro_batches(config, mesh.size)
    spec = networks.full_spec(_given(config.network))
    config_checks.check_features(config.run.features, resolution=spec["img_resolution"], channels=spec["img_channels"],
                                 label_dim=spec["label_dim"])
    source = _source(config, spec, objective) if with_data else None
    teacher = _teacher(config, spec, with_weights) if "teacher" in objective.needs else None

    total_steps = max(math.ceil(config.total_kimg * 1000 / config.batch_size), 1)
    if teacher is not None:
        spec = dict(teacher.network.spec)
        total_steps *= config.fake_score.updates
    fake_score = _role(config.fake_score, "fake_score", spec, total_steps)
    generator = _role(config.generator, "generator", spec, total_steps // config.fake_score.updates) if teacher else None
    recipe = steps.Recipe(
        objective=objective, fake_score=fake_score, generator=generator,
        teacher=networks.build(spec, dtype=config.teacher.dtype) if teacher else None,
        labels=labels.make(config.labels.scheme, spec["label_dim"], histogram=_histogram(config)),
        augment=_augmentation(config, fake_score.network), batch_size=config.batch_size, micro_batches=pieces,
        loop="python" if jax.default_backend() == "cpu" else "scan", sigma_init=config.generator.sigma_init,
        ema=dict(halflife_kimg=tuple(config.ema.halflife_kimg), rampup=config.ema.rampup), layout=Layout(mesh))

    shapes = jax.eval_shape(lambda: _initial_state(recipe, None))
    shardings = sharding.tree_shardings(shapes, mesh, config.sharding.rules)
    recipe = dataclasses.replace(
        recipe, fake_score=dataclasses.replace(fake_score, shardings=shardings.fake_score.params),
        generator=dataclasses.replace(generator, shardings=shardings.generator.params) if generator else None)
    return Experiment(
        config=config, recipe=recipe, teacher=teacher, source=source, shapes=shapes, shardings=shardings,
        teacher_shardings=sharding.tree_shardings(teacher.network.shapes(), mesh, config.sharding.teacher_rules) if teacher else None,
        total_steps=total_steps)


def initial_state(experiment: Experiment) -> DistillState:
    """The state before the first step: copies of the teacher, or random where a teacher is trained."""
    if experiment.teacher is None:
        make = jax.jit(lambda: _initial_state(experiment.recipe, experiment.config.seed), out_shardings=experiment.shardings)
        return make()

    def network(role: steps.Role, shardings: TrainState, shapes: TrainState) -> TrainState:
        def copy(layout: Params) -> Params:
            # Every copy is placed on its own: two networks that shared a buffer could not both be donated.
            return jax.jit(role.network.project, out_shardings=layout)(sharding.place(experiment.teacher.params, layout))

        copies = {name: copy(shardings.ema[name]) for name in shapes.ema}
        params = copy(shardings.params)
        opt_state = jax.jit(role.optimizer.init, out_shardings=shardings.opt_state)(params)
        return TrainState(step=sharding.place(0, shardings.step).astype("int32"), params=params, opt_state=opt_state, ema=copies)

    recipe, shardings, shapes = experiment.recipe, experiment.shardings, experiment.shapes
    return DistillState(
        step=sharding.place(0, shardings.step).astype("int32"),
        generator=network(recipe.generator, shardings.generator, shapes.generator),
        fake_score=network(recipe.fake_score, shardings.fake_score, shapes.fake_score))


def _initial_state(recipe: steps.Recipe, seed: int | None) -> DistillState:
    def network(role: steps.Role, averaged: bool, key) -> TrainState:
        params = role.network.init(key)
        names = optim.ema_names(recipe.ema["halflife_kimg"]) if averaged else ()
        ema = {name: jax.tree.map(lambda p: p.copy(), params) for name in names}
        return TrainState(step=jax.numpy.int32(0), params=params, opt_state=role.optimizer.init(params), ema=ema)

    key = jax.random.fold_in(jax.random.key(seed or 0), randomness.purpose_id("init"))
    generator = network(recipe.generator, True, key) if recipe.generator else None
    fake_score = network(recipe.fake_score, recipe.generator is None, key)
    return DistillState(step=jax.numpy.int32(0), generator=generator, fake_score=fake_score)


def _given(section: ConfigDict) -> dict[str, Any]:
    """A section without the keys that are None."""
    return {k: v for k, v in section.to_dict().items() if v is not None}


def _histogram(config: ConfigDict) -> tuple[float, ...] | None:
    return tuple(config.labels.histogram) or None


def _micro_batches(config: ConfigDict, num_devices: int) -> int:
    """Into how many pieces an update's batch is cut."""
    batch, limit = config.batch_size, config.max_batch_per_device
    if batch % num_devices:
        below, above = batch // num_devices * num_devices, -(-batch // num_devices) * num_devices
        raise ValueError(f"batch_size: got {batch} on {num_devices} devices, allowed: a multiple of {num_devices}, "
                         f"such as {below or above} or {above}")
    per_device = batch // num_devices
    if not limit or limit >= per_device:
        return 1
    return next(n for n in range(-(-per_device // limit), per_device + 1) if per_device % n == 0)


def _role(section: ConfigDict, name: str, spec: Mapping[str, Any], total_steps: int) -> steps.Role:
    try:
        noise = _given(section.noise)
        return steps.Role(
            network=networks.build(spec, dtype=section.dtype, remat=section.remat, dropout=section.dropout),
            optimizer=optim.make_optimizer(**_given(section.optimizer), total_steps=max(total_steps, 1)),
            noise=noise_levels.make(noise.pop("name"), **noise))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _augmentation(config: ConfigDict, network: networks.Network):
    p = config.fake_score.augment_p
    if not p:
        return None
    if network.augment_dim != augment.LABEL_DIM:
        raise ValueError(f"fake_score.augment_p: got {p} for a network with augment_dim {network.augment_dim}, "
                         f"allowed: 0, or a network with augment_dim {augment.LABEL_DIM}")
    return lambda keys, images: augment.augment(keys, images, p=p)


def _source(config: ConfigDict, spec: Mapping[str, Any], objective: objectives.Objective) -> Source | None:
    knobs = _given(config.data)
    name = knobs.pop("name")
    if "data" in objective.needs and name == "none":
        raise ValueError(f"data.name: got 'none', allowed with method {config.method!r}: digits, images, tfds")
    if "data" not in objective.needs:
        if name != "none":
            raise ValueError(f"data.name: got {name!r}, allowed with method {config.method!r}: none, it needs no images")
        if knobs:
            raise ValueError(f"data.{next(iter(knobs))}: got {next(iter(knobs.values()))!r}, allowed: only where data.name is not 'none'")
        return None
    return make_source(name, **knobs, resolution=spec["img_resolution"], channels=spec["img_channels"],
                       label_dim=spec["label_dim"])


def _teacher(config: ConfigDict, spec: Mapping[str, Any], with_weights: bool) -> load.Loaded:
    if not with_weights:
        network = networks.build(spec)
        return load.Loaded(network=network, params=network.shapes(), sigma_init=None, origin={"path": None})
    if not config.teacher.path:
        raise ValueError(f"teacher.path: got nothing, but method {config.method!r} needs a teacher; allowed: a converted directory, "
                         "a .safetensors file, the workdir of a teacher run, or 'builtin:digits'")
    teacher = load.load_teacher(config.teacher.path, ema=config.teacher.ema, spec=spec)
    different = networks.differences(teacher.network.spec, spec)
    if different:
        raise ValueError(f"teacher.path: {config.teacher.path} is another network than config.network: {'; '.join(different)}")
    return teacher


def plain(config: ConfigDict) -> dict[str, Any]:
    """The config as JSON holds it: tuples become lists."""
    return json.loads(json.dumps(config.to_dict()))


def changes(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The keys in which two plain configs differ, but for what may change on resumption (`run`, `total_kimg`)."""
    out = []
    for key in sorted(old.keys() | new.keys()):
        name = prefix + key
        a, b = old.get(key), new.get(key)
        if name in ("run", "total_kimg") or a == b:
            continue
        out += changes(a, b, name + ".") if isinstance(a, Mapping) and isinstance(b, Mapping) else [f"{name}: {a!r} -> {b!r}"]
    return out


def explain_unknown(config: ConfigDict, dotted: str) -> str:
    """The message for an override of a key that does not exist."""
    section, path = config, dotted.split(".")
    for i, part in enumerate(path):
        if not isinstance(section, ConfigDict) or part not in section:
            allowed = sorted(section) if isinstance(section, ConfigDict) else []
            close = difflib.get_close_matches(part, allowed, 1)
            hint = f" (did you mean {'.'.join([*path[:i], close[0]])!r}?)" if close else ""
            where = f"config.{'.'.join(path[:i])}" if i else "config"
            return f"config.{dotted}: unknown key{hint}; allowed in {where}: {', '.join(allowed)}"
        section = section[part]
    return f"config.{dotted}: cannot be set"


