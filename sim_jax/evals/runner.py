"""Measures a generator, or any images, against a reference: what `sim_jax.evaluate` and the training loop call.

    measure = runner.open_measure(features="digits", reference="digits", metrics=("fd", "class"), layout=layout)     once
    result = measure.samples(sampler, params, seed=1, count=2000, batch=sampler_batch)                          as often as needed
    result.numbers["fd"], result.protocol

Nothing is written, and no image is kept but those that a metric needs. The network's parameters are on the sampler's devices; the
features are measured on the same mesh. Every figure has its protocol beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from sim_jax.evals import figures, protocols, statistics, streams
from sim_jax.evals import reference as references
from sim_jax.evals.features import FeatureExtractor, open_features
from sim_jax.evals.generate import ImageSampler
from sim_jax.evals.protocols import Protocol
from sim_jax.evals.statistics import Summary
from sim_jax.sharding import Layout
from sim_jax.types import Params

_LARGE_BIAS = 0.1   # of the distance itself: then the number of images is a part of the figure, and a note says so

_MANY = 10_000       # images, whose neighbours and eigenvalues take long enough to say so


class Result(NamedTuple):
    """Figures of one set of images, or of several runs.

    Attributes:
      numbers: {name: value}, flat.
      protocol: how they were measured, ready for JSON.
      details: what has no single value, ready for JSON; of several runs, the numbers of each under "runs".
      pictures: {name: uint8 [H,W,C]}.
    """

    numbers: dict[str, float]
    protocol: dict[str, Any]
    details: dict[str, Any]
    pictures: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Measure:
    """What is measured, in which features, against what.

    Attributes:
      extractor: the features.
      metrics: names of figures.METRICS.
      reference: what the metrics need of it; None where they need none.
      seed: of everything that the metrics draw (subsets), not of samples.
      max_rows: most single images that are kept of a set.
    """

    extractor: FeatureExtractor
    metrics: tuple[str, ...]
    reference: Summary | None
    seed: int = 0
    max_rows: int = statistics.MAX_ROWS

    def stream(self, stream: streams.ImageStream, *, progress: Callable[[int], None] | None = None,
               note: Callable[[str], None] | None = None) -> Result:
        """Figures of any images.

        Args:
          progress: called with the number of images done.
          note: called with a text before each metric that takes long where there are many images.
        Raises: ValueError for images that do not fit, as `statistics.collect` does.
        """
        needs = figures.needs(self.metrics, of_reference=False)
        samples = statistics.collect(stream, self.extractor, needs, max_rows=self.max_rows, seed=self.seed, progress=progress)
        numbers, details, pictures = {}, {}, {}
        for name in self.metrics:
            if note is not None and samples.count >= _MANY:
                note(f"all images are measured; computing {name}")
            found = figures.METRICS[name].compute(samples, self.reference, self.seed)
            numbers, details, pictures = numbers | found.numbers, details | found.details, pictures | found.pictures
        protocol = {"count": samples.count, "images": samples.hash, "label_scheme": "none" if stream.labels is None else "given",
                    "features": self.extractor.identifier, **self._about_reference(), "seed_of_metrics": self.seed}
        notes = self._notes(samples, numbers)
        return Result(numbers, protocol | ({"notes": notes} if notes else {}), details, pictures)

    def samples(self, sampler: ImageSampler, params: Params, *, seed: int, count: int, batch: int, start: int = 0,
                classes: np.ndarray | None = None, rounding: str = "edm", progress: Callable[[int], None] | None = None,
                note: Callable[[str], None] | None = None) -> Result:
        """Figures of samples start ... start + count - 1 of `seed`, drawn while they are measured.

        Args:
          sampler, params: the parameters on the sampler's devices.
          batch: images per program, over all devices; the one that the sampler is used with elsewhere compiles nothing new.
          classes: int [count]; None draws them by (seed, index), as the sampler's latents say.
          rounding: of protocols.ROUNDINGS.
          progress, note: as in `stream`.
        Raises: ValueError where the network gives NaN, and as `stream`.
        """
        name, to_uint8 = protocols.ROUNDINGS[rounding]
        stream = streams.sampled(sampler, params, seed=seed, count=count, start=start, classes=classes, rounding=to_uint8, batch=batch)
        result = self.stream(stream, progress=progress, note=note)
        latents = sampler.latents
        scheme = "none" if not latents.label_dim else latents.scheme if classes is None else "given"
        about = {"seed": seed, "samples": f"{start}-{start + count - 1}", "label_scheme": scheme, "rounding": name,
                 "sampler": protocols.describe(sampler.spec), "calls": sampler.spec.calls}
        return result._replace(protocol=result.protocol | about)

    def runs(self, sampler: ImageSampler, params: Params, protocol: Protocol, *, batch: int,
             progress: Callable[[int], None] | None = None, note: Callable[[str], None] | None = None) -> Result:
        """All runs of a protocol, summed up as it says: `X_mean` and `X_spread` (standard deviation) where there are several."""
        counts = None if self.reference is None else self.reference.label_counts
        latents = protocols.latents(protocol, sampler.latents, counts)
        done: list[Result] = []
        for run in range(protocol.repeats):
            start = run * protocol.count
            classes = latents.classes_of(protocol.seed, np.arange(start, start + protocol.count))
            tick = None if progress is None else lambda images, before=start: progress(before + images)
            done.append(self.samples(sampler, params, seed=protocol.seed, start=start, count=protocol.count, classes=classes, batch=batch,
                                     rounding=protocol.rounding, progress=tick, note=note))
        scheme = latents.scheme if latents.label_dim else "none"
        return _sum_up(done, protocol, {"label_scheme": scheme})

    def _about_reference(self) -> dict[str, Any]:
        if self.reference is None:
            return {"reference": None}
        known = self.reference
        return {"reference": known.hash, "reference_origin": known.origin, "reference_count": known.count,
                "reference_features": known.extractor or "not recorded in the file"}

    def _notes(self, samples: Summary, numbers: Mapping[str, float]) -> list[str]:
        notes = []
        if "fd" in numbers and samples.count <= len(samples.features.mean):
            notes.append(f"{samples.count} images for {len(samples.features.mean)} features: the covariance is singular, and fd says "
                         "little; compare equal counts only")
        elif "fd" in numbers and numbers["fd_bias"] > _LARGE_BIAS * numbers["fd"]:
            notes.append(f"{samples.count} perfect samples would show an fd of about {numbers['fd_bias']:.3g}, not of zero: compare equal "
                         "counts only, or measure fd_inf")
        if "fd" in numbers and self.reference is not None and not self.reference.extractor:
            notes.append("the reference does not say which features it was measured in; only their number was checked")
        if "rows" in figures.needs(self.metrics, of_reference=False) and samples.count > self.max_rows:
            notes.append(f"metrics of single images use {self.max_rows} of {samples.count} samples")
        return notes


def open_measure(*, features: str | FeatureExtractor, metrics: str | Iterable[str], reference: str | Summary | None = None,
                 layout: Layout = Layout(), convention: str | None = None, image_shape: tuple[int, int, int] | None = None,
                 seed: int = 0, max_rows: int = statistics.MAX_ROWS, progress: Callable[[int, int], None] | None = None) -> Measure:
    """Opens features and reference, and measures the latter where it is a set of images.

    Args:
      features, convention: of `features.open_features`.
      metrics: "fd,kd" or ("fd", "kd"), of figures.METRICS.
      reference: of `reference.open_reference`, or a Summary; None only for metrics that need none.
      layout: the mesh on which features are measured.
      image_shape: (H, W, C) of what will be measured; other images than the features take are then refused at once.
      progress: called with the number of reference images done, and of all.
    Raises: ValueError for anything missing, damaged, unknown or not fitting.
    """
    metrics = figures.parse(metrics)
    extractor = features if isinstance(features, FeatureExtractor) else open_features(features, layout=layout, convention=convention)
    statistics.check_needs(extractor, figures.needs(metrics, of_reference=False))
    if image_shape is not None:
        extractor.check((1, *image_shape))
    needs = figures.needs(metrics, of_reference=True)
    if reference is None and needs:
        lacking = next(name for name in metrics if figures.METRICS[name].of_reference)
        raise ValueError(f"reference: got nothing, allowed: a data set or its statistics, as {lacking} needs one")
    if not needs:
        reference = None
    elif isinstance(reference, str):
        reference = references.open_reference(reference, extractor, needs, image_shape=image_shape, max_rows=max_rows, seed=seed,
                                              progress=progress)
    return Measure(extractor=extractor, metrics=metrics, reference=reference, seed=seed, max_rows=max_rows)


def _sum_up(runs: list[Result], protocol: Protocol, about: Mapping[str, Any]) -> Result:
    table = {name: np.array([run.numbers[name] for run in runs]) for name in runs[0].numbers if all(name in run.numbers for run in runs)}
    best = int(np.argmin(table["fd"])) if protocol.summary == "min" and "fd" in table else 0
    quoted = runs[best]
    numbers, details = dict(quoted.numbers), dict(quoted.details)
    if len(runs) > 1:
        means = {name: float(values.mean()) for name, values in table.items()}
        numbers = means if protocol.summary == "mean" else numbers | {f"{name}_mean": value for name, value in means.items()}
        numbers |= {f"{name}_spread": float(values.std(ddof=1)) for name, values in table.items()}
        details["runs"] = [{"samples": run.protocol["samples"], "images": run.protocol["images"], **run.numbers} for run in runs]
    told = {key: quoted.protocol[key] for key in quoted.protocol if key not in ("samples", "images")}
    return Result(numbers, {**told, **protocol.about(), **about}, details, quoted.pictures)
