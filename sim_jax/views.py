"""How samples are shown and measured: images in grids, points of the plane as clouds."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from sim_jax import images, load
from sim_jax import metrics as metric_files
from sim_jax.evals import figures, points, runner
from sim_jax.evals.generate import ImageSampler
from sim_jax.experiment import Experiment
from sim_jax.models import gaussian_mixture
from sim_jax.types import Params

POINT_FIGURES = ("swd", "modes", "modes_reached", "mass_error", "high_quality")
EVAL_SEED = 1  # of the samples that are measured; pictures start from other noise


class Measured(NamedTuple):
    """figures: {name: value}; real: what the real samples show among themselves, by name; protocol: how it was measured."""

    figures: dict[str, Any]
    real: dict[str, Any]
    protocol: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """What a showcase asks of its samples.

    Attributes:
      finish: float32 [B,H,W,C] of a network -> what is kept of them.
      picture: samples -> uint8 [H,W,C].
      strip: that picture, number of samples -> its part for a strip of moments.
      statistics: (samples, reference samples or None) -> figures by name, for every picture.
      headline: the names of the figures that a run is judged by, the first one most.
      measure: (sampler, its parameters) -> Measured; None where there is nothing to measure in.
      decode: latents float32 [B,h,w,c] of a network -> images float32 [B,H,W,C]; None where they are images.
    """

    finish: Callable[[np.ndarray], np.ndarray]
    picture: Callable[[np.ndarray], np.ndarray]
    strip: Callable[[np.ndarray, int], np.ndarray]
    statistics: Callable[..., dict[str, float]]
    headline: tuple[str, ...]
    measure: Callable[[ImageSampler, Params], Measured] | None
    decode: load.Decoder | None = None


def make(experiment: Experiment) -> View:
    """The view for the experiment's kind of samples."""
    return _points(experiment) if is_points(experiment) else _images(experiment)


def is_points(experiment: Experiment) -> bool:
    """Whether samples are points: images of one pixel, from a teacher that is a mixture of Gaussians."""
    return experiment.recipe.image_shape[:2] == (1, 1) and experiment.teacher is not None and "means" in _mixture(experiment)


def columns(config) -> int:
    """Of a grid of samples."""
    return min(10, config.run.grid)


def _images(experiment: Experiment) -> View:
    config, network, layout = experiment.config, experiment.trained.network, experiment.layout
    run, shape, decode = config.run, network.image_shape, None
    if run.autoencoder:
        shape = load.decoded_shape(run.autoencoder, network.spec, key="run.autoencoder")
        decode = load.Decoder(run.autoencoder, network.spec, layout=layout, key="run.autoencoder")
    metrics = tuple(name for name in figures.parse(run.metrics) if network.label_dim or name != "class")

    @functools.cache
    def opened() -> runner.Measure:
        reference = run.reference or ("digits" if run.features == "digits" else config.data.path)
        return runner.open_measure(features=run.features, metrics=metrics, reference=reference, layout=layout, image_shape=shape)

    def measure(sampler: ImageSampler, params: Params) -> Measured:
        result = opened().samples(sampler, params, seed=EVAL_SEED, count=run.eval_images, batch=run.batch_per_device * layout.mesh.size)
        numbers = dict(result.numbers)
        real = {"fd": numbers.pop("real_halves_fd")} if "real_halves_fd" in numbers else {}
        floor = {"noise_floor": numbers.pop("noise_floor")} if "noise_floor" in numbers else {}
        return Measured(numbers, real, result.protocol | floor)

    def first_row(picture: np.ndarray, count: int) -> np.ndarray:
        return picture[: (picture.shape[0] - 1) // -(-count // columns(config)) + 1]

    headline = ("fd", "class_agreement") if network.label_dim else ("fd",)
    return View(finish=lambda pixels: images.to_uint8(images.presentable(pixels)), decode=decode, strip=first_row,
                picture=lambda pixels: images.grid(pixels, columns=columns(config), scale=None),
                statistics=metric_files.image_statistics, headline=headline,
                measure=measure if run.features != "none" and run.eval_images else None)


def _mixture(experiment: Experiment) -> Mapping[str, np.ndarray]:
    """The parameters of an analytic teacher, wherever its module keeps them."""
    params = experiment.teacher.params
    return params.get("model", params) if isinstance(params, Mapping) else {}


def exact(experiment: Experiment, count: int, seed: int) -> np.ndarray:
    """Samples [count,1,1,D] of an analytic teacher's own distribution."""
    drawn = gaussian_mixture.sample(_mixture(experiment), jax.random.key(seed), count)
    return np.asarray(drawn).reshape(count, *experiment.recipe.image_shape)


def _points(experiment: Experiment) -> View:
    config, params = experiment.config, _mixture(experiment)

    def flat(samples: np.ndarray) -> np.ndarray:
        return np.asarray(samples).reshape(len(samples), -1)

    def judged(samples: np.ndarray) -> dict[str, float]:
        target = flat(exact(experiment, len(samples), seed=10))
        return {"swd": points.sliced_wasserstein(flat(samples), target), **points.modes(flat(samples), params)}

    def statistics(samples: np.ndarray, reference: np.ndarray | None = None) -> dict[str, float]:
        return {f"samples/{name}": value for name, value in judged(samples).items() if name in POINT_FIGURES}

    def measure(sampler: ImageSampler, network_params: Params) -> Measured:
        count = config.run.eval_images
        samples, _ = sampler(network_params, seed=EVAL_SEED, count=count)
        protocol = {"count": count, "reference_count": count, "reference": "samples of the mixture itself, seed 10"}
        return Measured(judged(samples), judged(exact(experiment, count, seed=11)), protocol)

    return View(finish=np.asarray, picture=lambda samples: cloud(flat(samples), extent=_extent(params)), strip=lambda picture, count: picture,
                statistics=statistics, headline=POINT_FIGURES[:2], measure=measure if config.run.eval_images else None)


def _extent(params: Mapping[str, np.ndarray]) -> float:
    """Half the side of the square that is drawn."""
    return float(1.25 * np.max(np.abs(params["means"])) + 4 * np.max(params["std"]))


def cloud(samples: np.ndarray, *, extent: float, size: int = 300) -> np.ndarray:
    """The first two coordinates of samples [N,D] as a picture, uint8 [size,size,3]: darker is denser, on a logarithmic scale."""
    counts, _, _ = np.histogram2d(-samples[:, 1], samples[:, 0], bins=size, range=[[-extent, extent]] * 2)
    dark = np.log1p(counts) / np.log1p(max(counts.max(), 1))
    return np.round(255 * (1 - dark[..., None] * np.array([1.0, 0.72, 0.25]))).astype(np.uint8)


def plane(experiment: Experiment, generated: np.ndarray, fields: Mapping[str, np.ndarray], where: np.ndarray, sigma: float,
          judged: Mapping[str, Any], floor: float) -> np.ndarray:
    """Target, generator and score fields side by side, uint8 [H,W,3].

    Args:
      generated: points [N,D].
      fields: scores by network, vectors [M,2] at `where` [M,2], at noise level `sigma`.
      judged: the generator's figures, with `swd`, `modes`, `of`.
      floor: the sliced Wasserstein distance between two true samples.
    """
    import matplotlib  # here, because it takes a while to import

    matplotlib.use("Agg")
    from matplotlib import pyplot

    extent = _extent(_mixture(experiment))
    target = exact(experiment, len(generated), seed=10).reshape(len(generated), -1)
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 4.3), dpi=90, layout="constrained")
    for axis, samples, title in ((axes[0], target, f"target (two samples of it: SWD {floor:.3f})"), (
            axes[1], generated, f"generator: {judged['modes']} of {judged['of']} modes, SWD {judged['swd']:.3f}")):
        axis.scatter(samples[:, 0], samples[:, 1], s=1.0, alpha=0.25, color="#1f5fa8", linewidths=0)
        axis.set_title(title, fontsize=10)
    for (name, field), colour in zip(fields.items(), ("#1b9e77", "#d95f02")):
        axes[2].quiver(where[:, 0], where[:, 1], field[:, 0], field[:, 1], color=colour, angles="xy", width=0.003, label=name)
    axes[2].set_title(f"scores at sigma {sigma:g}", fontsize=10)
    axes[2].legend(fontsize=8, loc="upper right", frameon=True)
    for axis in axes:
        axis.set(xlim=(-extent, extent), ylim=(-extent, extent), aspect="equal", xticks=[], yticks=[])
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
    pyplot.close(figure)
    return pixels
