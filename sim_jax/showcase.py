"""What a run shows for itself: samples from fixed noise, training panels, figures, and the final report."""

from __future__ import annotations

import functools
import math
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from sim_jax import distributed, images, load, optim, panels, probes, processes, report, sharding, steps, views, weights
from sim_jax import metrics as metric_files
from sim_jax.data import pipeline
from sim_jax.data.source import gather
from sim_jax.evals.generate import ImageSampler, SamplerSpec
from sim_jax.experiment import Experiment
from sim_jax.metrics import MetricWriter
from sim_jax.state import DistillState, TrainState
from sim_jax.types import Cond, Params

_GRID_SEED = 0  # of pictures
BEST = "best.safetensors"
_JUDGED = 128  # real images in the discriminator's histograms
_FIELD_SIGMA, _FIELD_ARROWS = 0.3, 17  # of the score fields of points: noise level, arrows a side


class Showcase:
    """Draws, measures and reports, for one run.

    Args:
      experiment: a checked config.
      workdir: pictures go to its `samples/`.
      writer: takes statistics and pictures.
      teacher_params: on the devices; None where a teacher is trained.
    """

    def __init__(self, experiment: Experiment, workdir: pathlib.Path, writer: MetricWriter, teacher_params: Params | None):
        config, recipe = experiment.config, experiment.recipe
        self._experiment, self._workdir, self._writer, self._teacher_params = experiment, workdir, writer, teacher_params
        self._latents = experiment.latents()
        self._view = views.make(experiment)
        diffusion = experiment.teacher_sampler()
        kwargs = dict(latents=self._latents, layout=recipe.layout, batch_per_device=config.run.batch_per_device, finish=self._view.finish,
                      decode=self._view.decode)
        self._teacher = self._generator = None
        if experiment.distils:
            self._teacher = ImageSampler(recipe.teacher, diffusion, **kwargs)
            self._generator = ImageSampler(recipe.generator.network, SamplerSpec(few_step=recipe.plan), **kwargs)
        else:
            self._teacher = ImageSampler(recipe.fake_score.network, diffusion, **kwargs)
        self._ema = (*optim.ema_names(config.ema.halflife_kimg), "raw")[0]
        # A grid shows the classes in turn, so that columns compare like with like.
        count, label_dim = config.run.grid, self._latents.label_dim
        self._classes = np.arange(count) % label_dim if label_dim else np.zeros(count, np.int32)
        self._reference: np.ndarray | None = None
        self._best = _recorded_best(workdir / BEST, config.run.best)
        self._panels = None
        if experiment.distils and config.run.panel_images and not views.is_points(experiment):
            size = recipe.layout.mesh.size
            self._levels = probes.run_levels(config.generator.noise)
            self._real = None if experiment.source is None else _first_images(experiment, -(-_JUDGED // size) * size)
            count = -(-config.run.panel_images // size) * size
            self._panels, self._text = jax.jit(panels.make_panels(recipe, self._levels, count=count)), experiment.fixed_text(count)

    def _trained(self, state: DistillState) -> tuple[ImageSampler, Params]:
        network: TrainState = state.generator if self._experiment.distils else state.fake_score
        return (self._generator or self._teacher), _averages(network)[self._ema]

    def _path(self, name: str) -> pathlib.Path:
        return self._workdir / "samples" / f"{name}.png"

    def _save(self, name: str, pixels: np.ndarray, **about: str) -> None:
        if jax.process_index() == 0:
            self._path(name).parent.mkdir(parents=True, exist_ok=True)
            images.save_png(self._path(name), self._view.picture(pixels), metadata={"seed": str(_GRID_SEED), **about})

    def reference(self) -> np.ndarray | None:
        """The teacher's samples from the grid's noise and classes; None where a teacher is trained."""
        if self._reference is None and self._experiment.distils:
            self._reference, _ = self._teacher(self._teacher_params, seed=_GRID_SEED, count=len(self._classes), classes=self._classes)
            self._save("teacher", self._reference, calls=str(self._teacher.spec.calls))
        return self._reference

    def samples(self, step: int, state: DistillState) -> np.ndarray:
        """Draws the grid at `step`, saves it, and logs brightness, contrast and diversity beside the teacher's."""
        sampler, params = self._trained(state)
        pixels, _ = sampler(params, seed=_GRID_SEED, count=len(self._classes), classes=self._classes)
        self._save(f"step_{step:08d}", pixels, step=str(step), ema=self._ema, calls=str(sampler.spec.calls))
        batch = self._experiment.config.batch_size
        self._writer.write(step, step * batch / 1000, self._view.statistics(pixels, self.reference()))
        self._writer.write_image(step, "samples", self._view.picture(pixels))
        if step:
            for name, picture in self.panels(state, log_at=step).items():
                self._writer.write_image(step, f"panels/{name}", picture)
        return pixels

    def panels(self, state: DistillState, *, log_at: int | None = None) -> dict[str, np.ndarray]:
        """The training panels as pictures by title; logs the gradients' scales and the discriminator's histograms at step `log_at`."""
        if self._panels is None:
            return {}
        seen = sharding.to_host(self._panels(state, self._teacher_params, jax.random.key(_GRID_SEED), self._real, self._text))
        if log_at is not None:
            self._writer.write(log_at, log_at * self._experiment.config.batch_size / 1000, panels.gradient_scales(seen, self._levels))
        out = {panels.TITLES[name]: picture for name, picture in panels.pictures(seen).items()}
        if "real" in seen:
            for name in ("real", "fake") if log_at is not None else ():
                self._writer.write_histogram(log_at, f"discriminator/{name}", seen[name])
            out["discriminator's logits"] = panels.histogram(seen)
        return out

    def measure(self, step: int, state: DistillState) -> dict[str, float]:
        """The figures of every average at `step`, by name; nothing where there is nothing to measure in. Keeps the best generator."""
        if self._view.measure is None:
            return {}
        out = {}
        for name, params in self._averages(state).items():
            figures = self._view.measure(self._trained(state)[0], params).figures
            suffix = "" if name == self._ema else f"_{name}"
            out |= {f"{figure}/{self._role}{suffix}": figures[figure] for figure in self._view.headline if figure in figures}
            self._keep_best(step, name, params, figures)
        return out

    @property
    def _role(self) -> str:
        return "generator" if self._experiment.distils else "denoiser"

    def _averages(self, state: DistillState) -> dict[str, Params]:
        network = state.generator if self._experiment.distils else state.fake_score
        return network.ema or _averages(network)

    def _keep_best(self, step: int, name: str, params: Params, figures: dict[str, Any]) -> None:
        """Writes the weights of the lowest `run.best` so far, in the format of sim_jax.export."""
        metric, experiment = self._experiment.config.run.best, self._experiment
        value = figures.get(metric)
        if not metric or value is None or not processes.agreed(int(value < self._best)):  # machines may round a figure differently
            return
        self._best = value
        host = sharding.to_host(params)
        if distributed.is_first():
            info = {"step": step, "ema": name, "labels": experiment.config.labels.to_dict(), "figures": {"generator": {metric: value}},
                    **(load.few_step_info(experiment.recipe.plan) if experiment.distils else {}),
                    **({} if experiment.captions is None else {"text_encoder": experiment.captions.encoder})}
            weights.save_file(self._workdir / BEST, host, experiment.trained.network.spec, info)

    def finish(self, state: DistillState, *, seconds: float, to_first_step: float | None, **about: Any) -> dict[str, Any]:
        """Measures everything in one table and writes report.json and report.html."""
        experiment, config = self._experiment, self._experiment.config
        view, (sampler, params) = self._view, self._trained(state)
        role = "generator" if experiment.distils else "teacher"
        rows: dict[str, dict[str, Any]] = {role: {"calls": sampler.spec.calls, **dict.fromkeys(view.headline)}}
        if experiment.distils:
            rows["teacher"] = {"calls": self._teacher.spec.calls, **dict.fromkeys(view.headline)}
        rows["real_halves"] = dict.fromkeys(view.headline[:1])  # promised in report.json, measured or not
        protocol: dict[str, Any] = {"ema": self._ema, "seed": views.EVAL_SEED}
        if view.measure is not None:
            begin = time.monotonic()
            measured = view.measure(sampler, params)
            self._keep_best(experiment.total_steps, self._ema, params, measured.figures)
            rows[role] |= measured.figures
            if experiment.distils:
                rows["teacher"] |= view.measure(self._teacher, self._teacher_params).figures
            rows["real_halves"] |= measured.real
            protocol |= measured.protocol
            protocol["teacher_sampler"] = f"{config.teacher.sampler}, {config.teacher.num_steps} steps"
            seconds += time.monotonic() - begin
        pixels, _ = sampler(params, seed=_GRID_SEED, count=len(self._classes), classes=self._classes)
        pictures = {role: self._view.picture(pixels)}
        if experiment.distils:
            pictures["teacher"] = self._view.picture(self.reference())
        pictures |= self._progress() | self.panels(state)
        if views.is_points(experiment) and view.measure is not None:
            pictures["plane"] = self._plane(state, measured.figures, measured.real)
        summary = {
            **rows, "method": config.method, "steps": experiment.total_steps, "kimg": experiment.total_steps * config.batch_size / 1000,
            "protocol": protocol, "seconds": {"total": seconds, "to_first_step": to_first_step},
            "parameters": experiment.trained.network.num_params(), **about,
        }
        if experiment.teacher is not None:
            summary["teacher_origin"] = dict(experiment.teacher.origin)
        if jax.process_index() == 0:
            self._writer.flush()
            calls = f"{sampler.spec.calls} network call{'s' if sampler.spec.calls > 1 else ''}"
            report.write_report(self._workdir, summary=summary, curves=metric_files.read_metrics(self._workdir), pictures=pictures,
                                config=config.to_dict(), title=f"{self._workdir.name}: {config.method}, {calls}")
        return summary

    def _plane(self, state: DistillState, figures: dict[str, Any], among_real: dict[str, Any]) -> np.ndarray:
        """Target, generator and score fields of points, in the report and as samples/plane.png."""
        experiment, side = self._experiment, np.linspace(-1, 1, _FIELD_ARROWS)
        sampler, params = self._trained(state)
        generated, _ = sampler(params, seed=views.EVAL_SEED, count=experiment.config.run.eval_images)
        where = 1.2 * np.max(np.abs(views.exact(experiment, 1000, seed=10))) * np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
        x, sigma = where.astype(np.float32).reshape(-1, 1, 1, 2), np.full(len(where), _FIELD_SIGMA, np.float32)

        @functools.partial(jax.jit, out_shardings=experiment.layout.replicated)
        def scores(fake_params: Params, teacher_params: Params) -> dict[str, jax.Array]:
            pair = steps.score_networks(experiment.recipe, fake_params, teacher_params)
            return {name: (fn(jnp.asarray(x), jnp.asarray(sigma), Cond()) - x) / _FIELD_SIGMA**2
                    for name, fn in zip(("teacher", "fake score"), pair)}

        fields = {name: field.reshape(-1, 2) for name, field in
                  sharding.to_host(scores(state.fake_score.params, self._teacher_params)).items()}
        picture = views.plane(experiment, generated.reshape(len(generated), -1), fields, where, _FIELD_SIGMA, figures, among_real["swd"])
        if distributed.is_first():
            images.save_png(self._path("plane"), picture)
        return picture

    def _progress(self, rows: int = 6) -> dict[str, np.ndarray]:
        """The first row of the saved grids, at up to `rows` moments, oldest first."""
        paths = sorted(self._workdir.glob("samples/step_*.png"))
        chosen = [paths[i] for i in sorted({round(i) for i in np.linspace(0, len(paths) - 1, rows)})] if paths else []
        out = {}
        for path in chosen:
            with Image.open(path) as picture:
                pixels = np.asarray(picture)
            kimg = int(path.stem.removeprefix("step_")) * self._experiment.config.batch_size / 1000
            out[f"progress/{kimg:.1f} kimg"] = self._view.strip(pixels, len(self._classes))
        return out


def _first_images(experiment: Experiment, count: int) -> dict[str, Any]:
    """Real images for pictures: the first of the source, again from the start where it has fewer, float32 on the devices."""
    index = np.arange(count) % len(experiment.source)
    pixels, classes = gather(experiment.source, index)
    arrays = {"image": pipeline.to_float(pixels), "label": classes}
    if experiment.captions is not None:
        arrays["text"], arrays["text_mask"] = experiment.captions.text(index)
    return {name: sharding.place(array, experiment.layout.batch) for name, array in arrays.items()}


def _recorded_best(path: pathlib.Path, metric: str) -> float:
    """The figure that an earlier part of the run has reached; infinity for none."""
    if not metric or not path.is_file():
        return math.inf
    return weights.read_header(path).get("figures", {}).get("generator", {}).get(metric, math.inf)


def _averages(network: TrainState) -> dict[str, Params]:
    """What can be sampled of a network: its averages, and the parameters themselves as "raw"."""
    return {**network.ema, "raw": network.params}
