"""What a run shows for itself: sample grids from fixed noise, Frechet distances, and the final report."""

from __future__ import annotations

import pathlib
import time
from typing import Any

import jax
import numpy as np
from PIL import Image

from sim_jax import images, optim, report
from sim_jax import metrics as metric_files
from sim_jax.data import digits
from sim_jax.evals import features, quality
from sim_jax.evals.generate import ImageSampler, SamplerSpec
from sim_jax.experiment import Experiment
from sim_jax.metrics import MetricWriter
from sim_jax.state import DistillState, TrainState
from sim_jax.types import Params

_GRID_SEED, _EVAL_SEED = 0, 1  # pictures and figures start from different noise
_FIGURES = ("fd", "class_agreement", "precision", "recall", "density", "coverage")


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
        steps = SamplerSpec(sampler=config.teacher.sampler, num_steps=config.teacher.num_steps)
        kwargs = dict(latents=self._latents, layout=recipe.layout, batch_per_device=config.run.batch_per_device)
        self._teacher = self._generator = None
        if experiment.distils:
            self._teacher = ImageSampler(recipe.teacher, steps, **kwargs)
            self._generator = ImageSampler(recipe.generator.network, SamplerSpec(sigma_init=recipe.sigma_init), **kwargs)
        else:
            self._teacher = ImageSampler(recipe.fake_score.network, steps, **kwargs)
        self._features = features.digits_features() if config.run.features == "digits" else None
        self._ema = optim.ema_names(config.ema.halflife_kimg)[0]
        # A grid shows the classes in turn, so that columns compare like with like.
        count, label_dim = config.run.grid, self._latents.label_dim
        self._classes = np.arange(count) % label_dim if label_dim else np.zeros(count, np.int32)
        self._reference: np.ndarray | None = None

    @property
    def _columns(self) -> int:
        return min(10, self._experiment.config.run.grid)

    def _trained(self, state: DistillState) -> tuple[ImageSampler, Params]:
        network: TrainState = state.generator if self._experiment.distils else state.fake_score
        return (self._generator or self._teacher), network.ema[self._ema]

    def _grid(self, pixels: np.ndarray) -> np.ndarray:
        return images.grid(pixels, columns=self._columns, scale=None)

    def _path(self, name: str) -> pathlib.Path:
        return self._workdir / "samples" / f"{name}.png"

    def _save(self, name: str, pixels: np.ndarray, **about: str) -> None:
        if jax.process_index() == 0:
            self._path(name).parent.mkdir(parents=True, exist_ok=True)
            images.save_png(self._path(name), self._grid(pixels), metadata={"seed": str(_GRID_SEED), **about})

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
        self._writer.write(step, step * batch / 1000, metric_files.image_statistics(pixels, self.reference()))
        self._writer.write_image(step, "samples", self._grid(pixels))
        return pixels

    def _quality(self, sampler: ImageSampler, params: Params, count: int) -> dict[str, Any]:
        pixels, classes = sampler(params, seed=_EVAL_SEED, count=count)
        real = digits.load()
        return quality.quality(pixels, classes if self._latents.label_dim else None, real_images=real.images, real_labels=real.labels,
                               features=self._features, label_scheme=self._latents.scheme)

    def measure(self, state: DistillState) -> dict[str, float]:
        """Frechet distances of every average during training, by name; nothing without features."""
        if self._features is None or not self._experiment.config.run.eval_images:
            return {}
        sampler, _ = self._trained(state)
        network = state.generator if self._experiment.distils else state.fake_score
        role = "generator" if self._experiment.distils else "denoiser"
        count = self._experiment.config.run.eval_images
        out = {}
        for name, params in network.ema.items():
            figures = self._quality(sampler, params, count)
            suffix = "" if name == self._ema else f"_{name}"
            out |= {f"fd/{role}{suffix}": figures["fd"], f"class_agreement/{role}{suffix}": figures["class_agreement"]}
        return {name: value for name, value in out.items() if value is not None}

    def finish(self, state: DistillState, *, seconds: float, to_first_step: float | None, **about: Any) -> dict[str, Any]:
        """Measures everything in one table and writes report.json and report.html."""
        experiment, config = self._experiment, self._experiment.config
        sampler, params = self._trained(state)
        role = "generator" if experiment.distils else "teacher"
        rows: dict[str, dict[str, Any]] = {role: {"calls": sampler.spec.calls, **dict.fromkeys(_FIGURES)}}
        if experiment.distils:
            rows["teacher"] = {"calls": self._teacher.spec.calls, **dict.fromkeys(_FIGURES)}
        rows["real_halves"] = {"fd": None}  # promised in report.json, measured or not
        protocol: dict[str, Any] = {"ema": self._ema, "seed": _EVAL_SEED}
        if self._features is not None and config.run.eval_images:
            begin = time.monotonic()
            measured = {role: self._quality(sampler, params, config.run.eval_images)}
            if experiment.distils:
                measured["teacher"] = self._quality(self._teacher, self._teacher_params, config.run.eval_images)
            for name, figures in measured.items():
                rows[name] |= {key: figures[key] for key in _FIGURES}
            real = digits.load()
            rows["real_halves"]["fd"] = quality.real_halves_fd(real.images, real.labels, features=self._features)
            keys = ("count", "reference_count", "reference", "features", "label_scheme", "noise_floor")
            protocol |= {key: measured[role][key] for key in keys}
            protocol["teacher_sampler"] = f"{config.teacher.sampler}, {config.teacher.num_steps} steps"
            seconds += time.monotonic() - begin
        pixels, _ = sampler(params, seed=_GRID_SEED, count=len(self._classes), classes=self._classes)
        pictures = {role: self._grid(pixels)}
        if experiment.distils:
            pictures["teacher"] = self._grid(self.reference())
        pictures |= self._progress()
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

    def _progress(self, rows: int = 6) -> dict[str, np.ndarray]:
        """The first row of the saved grids, at up to `rows` moments, oldest first."""
        paths = sorted(self._workdir.glob("samples/step_*.png"))
        chosen = [paths[i] for i in sorted({round(i) for i in np.linspace(0, len(paths) - 1, rows)})] if paths else []
        height = -(-len(self._classes) // self._columns)
        out = {}
        for path in chosen:
            with Image.open(path) as picture:
                pixels = np.asarray(picture)
            kimg = int(path.stem.removeprefix("step_")) * self._experiment.config.batch_size / 1000
            out[f"progress/{kimg:.1f} kimg"] = pixels[: (pixels.shape[0] - 1) // height + 1]
        return out
