"""From a config to everything static of a run: the one place that reads the config's sections, for every entry point.

`build` checks all of it, and raises ValueError naming the key before anything is compiled or written.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from sim_jax import config_checks, load, networks, objectives, optim, randomness, recipes, sharding
from sim_jax.data import captions as text
from sim_jax.data import make_source
from sim_jax.data.captions import Captions
from sim_jax.data.source import Source
from sim_jax.evals.generate import Latents, SamplerSpec
from sim_jax.recipe import Recipe, Role
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
      captions: of the images or, in a data-free run, what is asked of the generator; None without text.
      shown: captions of pictures, probes and figures.
      shapes, shardings: of the DistillState.
      teacher_shardings: of the teacher's parameters.
      start_steps: iterations before the generator's first turn begins.
      total_steps: iterations of the whole run.
    """

    config: ConfigDict
    recipe: Recipe
    teacher: load.Loaded | None
    source: Source | None
    captions: Captions | None = None
    shown: Captions | None = None
    shapes: DistillState
    shardings: DistillState
    teacher_shardings: Params | None
    start_steps: int
    total_steps: int

    @property
    def layout(self) -> Layout:
        return self.recipe.layout

    @property
    def distils(self) -> bool:
        return self.recipe.generator is not None

    @property
    def trained(self) -> Role:
        """The network that the run is for."""
        return self.recipe.generator if self.distils else self.recipe.fake_score

    def turns(self, step: int) -> dict[str, bool]:
        """Which networks iteration `step` (from 0) moves, as `steps.train_step` takes it."""
        since = step - self.start_steps
        generator = self.distils and since >= 0 and (since + 1) % self.config.fake_score.updates == 0
        return {"update_critic": not (generator and self.config.fake_score.turns == "other"), "update_generator": generator}

    @property
    def cycle(self) -> list[dict[str, bool]]:
        """The turns of a whole cycle of iterations, once the generator moves."""
        return [self.turns(self.start_steps + i) for i in range(self.config.fake_score.updates if self.distils else 1)]

    def teacher_sampler(self) -> SamplerSpec:
        """How the teacher's own samples are drawn, or those of a denoiser in training."""
        section = self.config.teacher
        return SamplerSpec(sampler=section.sampler, num_steps=section.num_steps, guidance=section.guidance,
                           interval=tuple(section.guidance_interval) or None, null_text=self.recipe.guidance.null_text)

    def latents(self) -> Latents:
        """Where samples start: noise and classes by (seed, index)."""
        network = self.trained.network
        return Latents(network.image_shape, network.label_dim, self.config.labels.scheme, recipes.histogram(self.config), self.shown)

    def fixed_text(self, count: int) -> dict[str, Any] | None:
        """The first `count` captions of pictures, "text" and "text_mask" on the devices, again from the start where there are fewer."""
        if self.shown is None:
            return None
        states, mask = self.shown.text(np.arange(count) % len(self.shown))
        return {name: sharding.place(rows, self.layout.batch) for name, rows in (("text", states), ("text_mask", mask))}


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
    objective = objectives.get(config.method, critic=None if config.method == "dsm" else recipes.given(config.fake_score.loss),
                               **recipes.given(config.objective))
    mesh = sharding.make_mesh(config.sharding.mesh, devices=devices)
    for rules in (config.sharding.rules, config.sharding.teacher_rules):
        sharding.check_rules(rules, mesh)
    spec = networks.full_spec(recipes.given(config.network))
    if spec["img_resolution"] > 1:
        shown = (spec["img_resolution"], spec["img_resolution"], spec["img_channels"])
        if config.run.autoencoder and with_data:
            shown = load.decoded_shape(config.run.autoencoder, spec, key="run.autoencoder")
        config_checks.check_measure(config.run, resolution=shown[0], channels=shown[2])
    requirements = recipes.needs(config, objective)
    source = _source(config, spec, requirements) if with_data else None
    captions, shown = _captions(config, spec, source) if with_data else (None, None)
    teacher = _teacher(config, spec, with_weights) if "teacher" in requirements else None
    if teacher is not None and not recipes.is_analytic(teacher.network.spec):
        spec = dict(teacher.network.spec)
    recipe, start_steps, total_steps = recipes.make(config, objective, requirements, spec, teacher, mesh, captions)

    shapes = jax.eval_shape(lambda: _random_state(recipe, None))
    shardings = sharding.tree_shardings(shapes, mesh, config.sharding.rules)
    teacher_shardings = sharding.tree_shardings(teacher.network.shapes(), mesh, config.sharding.teacher_rules) if teacher else None
    return Experiment(
        config=config, recipe=_with_shardings(recipe, shardings, teacher_shardings), teacher=teacher, source=source, captions=captions,
        shown=shown, shapes=shapes, shardings=shardings, teacher_shardings=teacher_shardings, start_steps=start_steps, total_steps=total_steps)


def _with_shardings(recipe: Recipe, shardings: DistillState, teacher_shardings: Params | None) -> Recipe:
    """The recipe whose networks know where their parameters lie, and gather them layer by layer where they are cut."""

    def cut(network: Any, where: Params) -> Any:
        return dataclasses.replace(network, gather=sharding.gather_at_use(where))

    def place(role: Role | None, where: TrainState | None) -> Role | None:
        return role and dataclasses.replace(role, network=cut(role.network, where.params), shardings=where.params)

    fake_score = place(recipe.fake_score, shardings.fake_score)
    teacher = recipe.teacher and cut(recipe.teacher, teacher_shardings)
    adversary = recipe.adversary
    if adversary is not None:
        heads = dataclasses.replace(adversary.role.network, backbone=fake_score.network if adversary.features == "fake_score" else teacher)
        adversary = dataclasses.replace(
            adversary, role=place(dataclasses.replace(adversary.role, network=heads), shardings.discriminator))
    return dataclasses.replace(
        recipe, fake_score=fake_score, generator=place(recipe.generator, shardings.generator), teacher=teacher, adversary=adversary,
        layout=dataclasses.replace(recipe.layout, late=True))


def initial_state(experiment: Experiment) -> DistillState:
    """The state before the first step: copies of the teacher, or random where a teacher is trained or is no network of that kind."""
    recipe, shardings, shapes, seed = experiment.recipe, experiment.shardings, experiment.shapes, experiment.config.seed
    if experiment.teacher is None or recipes.is_analytic(experiment.teacher.network.spec):
        return jax.jit(lambda: _random_state(recipe, seed), out_shardings=shardings)()

    def network(role: Role, shardings: TrainState, shapes: TrainState) -> TrainState:
        def copy(layout: Params) -> Params:
            # Every copy is placed on its own: two networks that shared a buffer could not both be donated.
            return jax.jit(role.network.project, out_shardings=layout)(sharding.place(experiment.teacher.params, layout))

        copies = {name: copy(shardings.ema[name]) for name in shapes.ema}
        params = copy(shardings.params)
        opt_state = jax.jit(role.optimizer.init, out_shardings=shardings.opt_state)(params)
        return TrainState(step=sharding.place(0, shardings.step).astype("int32"), params=params, opt_state=opt_state, ema=copies)

    heads = memory = None
    if recipe.adversary is not None:
        heads = jax.jit(lambda: _random_network(recipe, recipe.adversary.role, "discriminator", seed), out_shardings=shardings.discriminator)()
    if recipe.objective.init_memory is not None:
        memory = jax.jit(recipe.objective.init_memory, out_shardings=shardings.objective_state)()
    return DistillState(
        step=sharding.place(0, shardings.step).astype("int32"),
        generator=network(recipe.generator, shardings.generator, shapes.generator),
        fake_score=network(recipe.fake_score, shardings.fake_score, shapes.fake_score), discriminator=heads, objective_state=memory)


def _random_network(recipe: Recipe, role: Role, purpose: str, seed: int | None, *, averaged: bool = False) -> TrainState:
    params = role.network.init(jax.random.fold_in(jax.random.key(seed or 0), randomness.purpose_id(purpose)))
    names = optim.ema_names(recipe.ema["halflife_kimg"]) if averaged else ()
    ema = {name: jax.tree.map(lambda p: p.copy(), params) for name in names}
    return TrainState(step=jax.numpy.int32(0), params=params, opt_state=role.optimizer.init(params), ema=ema)


def _random_state(recipe: Recipe, seed: int | None) -> DistillState:
    # Generator and fake score start as one network here too.
    gan, memory = recipe.adversary, recipe.objective.init_memory
    return DistillState(
        step=jax.numpy.int32(0),
        generator=recipe.generator and _random_network(recipe, recipe.generator, "init", seed, averaged=True),
        fake_score=_random_network(recipe, recipe.fake_score, "init", seed, averaged=recipe.generator is None),
        discriminator=gan and _random_network(recipe, gan.role, "discriminator", seed),
        objective_state=memory and memory())


def _source(config: ConfigDict, spec: Mapping[str, Any], needs: frozenset[str]) -> Source | None:
    knobs = recipes.given(config.data)
    name = knobs.pop("name")
    terms = f"method {config.method!r}{' and an adversarial term' if 'discriminator' in needs else ''}"
    if "data" in needs and name == "none":
        raise ValueError(f"data.name: got 'none', allowed with {terms}: digits, images, scenes, tfds")
    if "data" not in needs:
        if name != "none":
            raise ValueError(f"data.name: got {name!r}, allowed with {terms}: none, it needs no images")
        if knobs:
            raise ValueError(f"data.{next(iter(knobs))}: got {next(iter(knobs.values()))!r}, allowed: only where data.name is not 'none'")
        return None
    return make_source(name, **knobs, resolution=spec["img_resolution"], channels=spec["img_channels"],
                       label_dim=spec["label_dim"])


def _captions(config: ConfigDict, spec: Mapping[str, Any], source: Source | None) -> tuple[Captions | None, Captions | None]:
    """Captions of training, and of pictures and figures."""
    network = networks.build(spec)
    brought, section = getattr(source, "captions", None), config.text
    if not network.text_dim:
        for key in ("path", "eval_path"):
            if section[key]:
                raise ValueError(f"text.{key}: got {section[key]!r}, allowed with {spec['model_type']}: nothing, it takes no text")
        return None, None
    if brought is not None and section.path:
        raise ValueError(f"text.path: got {section.path!r}, allowed with data.name {config.data.name!r}: nothing, its images have captions")
    if brought is None and not section.path:
        raise ValueError(f"text.path: got nothing, allowed with {spec['model_type']}: a directory that sim_jax.data.embed_prompts wrote, or "
                         f"{', '.join('builtin:' + name for name in text.BUILTIN)}")
    fit = dict(width=network.text_dim, tokens=network.text_tokens or None)
    captions = text.fitted(brought, **fit, key="data.name") if section.path is None else text.fitted(text.open_captions(section.path), **fit)
    if source is not None and len(captions) != len(source):
        raise ValueError(f"text.path: got {len(captions)} captions, allowed: {len(source)}, one for each image of data.name")
    if section.eval_path is None:
        return captions, captions
    opened = text.open_captions(section.eval_path, key="text.eval_path")
    if opened.encoder != captions.encoder:
        raise ValueError(f"text.eval_path: got captions of the encoder {opened.encoder!r}, allowed: {captions.encoder!r}, as in training")
    return captions, text.fitted(opened, **fit, key="text.eval_path")


def _teacher(config: ConfigDict, spec: Mapping[str, Any], with_weights: bool) -> load.Loaded:
    if not with_weights:
        network = networks.build(spec)
        return load.Loaded(network=network, params=network.shapes(), few_step=None, origin={"path": None})
    if not config.teacher.path:
        raise ValueError(f"teacher.path: got nothing, but method {config.method!r} needs a teacher; allowed: a converted directory, "
                         "a .safetensors file, the workdir of a teacher run, or 'builtin:digits'")
    teacher = load.load_teacher(config.teacher.path, ema=config.teacher.ema, spec=spec)
    if recipes.is_analytic(teacher.network.spec):
        same = ("img_resolution", "img_channels", "label_dim")
        different = [f"{k}: {teacher.network.spec[k]!r} != {spec[k]!r}" for k in same if teacher.network.spec[k] != spec[k]]
    else:
        different = networks.differences(teacher.network.spec, spec)
    if different:
        raise ValueError(f"teacher.path: {config.teacher.path} is another network than config.network: {'; '.join(different)}")
    return teacher


def plain(config: ConfigDict) -> dict[str, Any]:
    """The config as JSON holds it: tuples become lists."""
    return json.loads(json.dumps(config.to_dict()))


# What may change between a run and its resumption: how long it is, what it shows, and where (not what) it computes.
MAY_CHANGE = ("run", "total_kimg", "sharding", "max_batch_per_device", "generator.remat", "fake_score.remat", "teacher.remat")


def changes(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The keys in which two plain configs differ, but for MAY_CHANGE."""
    out = []
    for key in sorted(old.keys() | new.keys()):
        name = prefix + key
        a, b = old.get(key), new.get(key)
        if name in MAY_CHANGE or a == b:
            continue
        a = {} if a is None and isinstance(b, Mapping) else a  # a section that an earlier version did not have, and whose keys are None
        out += changes(a, b, name + ".") if isinstance(a, Mapping) and isinstance(b, Mapping) else [f"{name}: {a!r} -> {b!r}"]
    return out
