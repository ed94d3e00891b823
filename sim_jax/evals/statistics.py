"""What one set of images leaves behind after one pass over it: all that any metric needs of it, and no more.

What is collected is named by needs, which the metrics have (figures.py):

    features    mean and covariance of the features           spatial     the same of sFID's spatial features
    classes     the same of the features of every class       predicted   how many images the classifier puts into each class
    rows        single features, of at most `max_rows` images drawn in advance      pixels   the images of those rows
    score       the Inception score

Means and covariances are streamed in float64 (frechet.py): they grow with neither the number of images nor the chunks that these
come in, and differ between batch sizes and numbers of devices by what the network's float32 differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sim_jax.evals import frechet
from sim_jax.evals.features import FeatureExtractor
from sim_jax.evals.frechet import Gaussian
from sim_jax.evals.inception_score import InceptionScore
from sim_jax.evals.streams import ImageStream, begin_hash, end_hash

NEEDS = ("features", "spatial", "classes", "predicted", "rows", "pixels", "score")
MAX_ROWS = 50_000
_MERGE = 1024                 # features that wait for a merge, whose cost is that of the covariance
_CLASS_BYTES = 2 << 30        # largest covariances of all classes together


class Rows(NamedTuple):
    """index: int [n] within the set, ascending; features: float32 [n,F]; labels: int32 [n]; pixels: uint8 [n,H,W,C]."""

    index: np.ndarray
    features: np.ndarray
    labels: np.ndarray | None = None
    pixels: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Summary:
    """What is known of a set of images; None where nobody asked, or where a file does not have it.

    Attributes:
      count: images, or None where a file does not say.
      hash: of the images and labels (streams.py), or of a foreign file's mean and covariance.
      extractor: identifier of the features; "" where a foreign file does not say.
      origin: the name of the file, or of what was sampled.
      features, spatial: of the whole set.
      classes: by class; classes with fewer than 2 images have none.
      predicted: int [K].
      agreement: share of images whose predicted class is their label, where the classifier knows the labels' classes.
      label_counts: int [classes], where there are labels.
      rows, score: as in the module docstring.
    """

    count: int | None
    hash: str
    extractor: str
    origin: str = ""
    features: Gaussian | None = None
    spatial: Gaussian | None = None
    classes: Mapping[int, Gaussian] | None = None
    predicted: np.ndarray | None = None
    agreement: float | None = None
    label_counts: np.ndarray | None = None
    rows: Rows | None = None
    score: Mapping[str, float] | None = None


class _Moments:
    """Streamed mean and covariance of vectors that come in pieces of any size."""

    def __init__(self):
        self._waiting, self._number = [], 0
        self._total: frechet.GaussianStatistics | None = None

    def add(self, vectors: np.ndarray) -> None:
        self._waiting.append(vectors)
        self._number += len(vectors)
        if self._number >= _MERGE:
            self._merge()

    def _merge(self) -> None:
        if self._number:
            part = frechet.feature_statistics(np.concatenate(self._waiting))
            self._total = part if self._total is None else frechet.merge_statistics(self._total, part)
            self._waiting, self._number = [], 0

    def result(self) -> Gaussian | None:
        self._merge()
        if self._total is None or self._total.count < 2:
            return None
        return frechet.gaussian(self._total)


class _Collector:
    """Takes the outputs of the extractor, chunk by chunk."""

    def __init__(self, stream: ImageStream, needs: Iterable[str], *, max_rows: int, seed: int):
        self._needs, self._stream = frozenset(needs), stream
        self._moments = {name: _Moments() for name in ("features", "spatial") if name in self._needs}
        self._classes: dict[int, _Moments] = {}
        self._score = InceptionScore(stream.count, splits=min(10, stream.count), seed=seed) if "score" in self._needs else None
        self._predicted, self._agreeing, self._rows = np.zeros((), np.int64), 0, []
        index = np.arange(stream.count)
        if stream.count > max_rows:
            index = np.sort(np.random.default_rng(seed).choice(stream.count, max_rows, replace=False))
        self._index, self._done = index, 0

    def add(self, images: np.ndarray, outputs: Mapping[str, np.ndarray]) -> None:
        start, self._done = self._done, self._done + len(images)
        labels = None if self._stream.labels is None else self._stream.labels[start:self._done]
        for name, moments in self._moments.items():
            moments.add(outputs[name])
        if "classes" in self._needs:
            self._add_classes(outputs["features"], outputs["probabilities"].argmax(axis=1) if labels is None else labels)
        if "predicted" in self._needs:
            predicted = outputs["probabilities"].argmax(axis=1)
            self._predicted = self._predicted + np.bincount(predicted, minlength=outputs["probabilities"].shape[1])
            self._agreeing += 0 if labels is None else int((predicted == labels).sum())
        if self._score is not None:
            self._score.add(outputs["probabilities"])
        if "rows" in self._needs:
            here = self._index[np.searchsorted(self._index, start):np.searchsorted(self._index, self._done)] - start
            self._rows.append((outputs["features"][here], images[here].copy() if "pixels" in self._needs else None))

    def _add_classes(self, features: np.ndarray, labels: np.ndarray) -> None:
        for label in np.unique(labels).tolist():
            moments = self._classes.setdefault(label, _Moments())
            if len(self._classes) * features.shape[1] ** 2 * 8 > _CLASS_BYTES:
                raise ValueError(f"metrics: got class_fd for {len(self._classes)} classes or more with {features.shape[1]} features, "
                                 f"allowed: covariances of {_CLASS_BYTES >> 30} GiB together")
            moments.add(features[labels == label])

    def result(self, *, digest: str, extractor: FeatureExtractor) -> Summary:
        labels = self._stream.labels
        predicted = self._predicted if "predicted" in self._needs else None
        classes = {label: moments.result() for label, moments in sorted(self._classes.items())}
        rows = None
        if "rows" in self._needs:
            features, pixels = zip(*self._rows)
            rows = Rows(self._index, np.concatenate(features), None if labels is None else labels[self._index],
                        np.concatenate(pixels) if "pixels" in self._needs else None)
        return Summary(
            count=self._stream.count, hash=digest, extractor=extractor.identifier, origin=self._stream.origin, predicted=predicted,
            rows=rows, label_counts=None if labels is None else np.bincount(labels),
            **{name: moments.result() for name, moments in self._moments.items()},
            classes={k: v for k, v in classes.items() if v is not None} if "classes" in self._needs else None,
            agreement=None if predicted is None or labels is None or not extractor.labelled else self._agreeing / self._stream.count,
            score=None if self._score is None else self._score.result())


def check_needs(extractor: FeatureExtractor, needs: Iterable[str]) -> None:
    """Raises ValueError where an extractor cannot give what is needed."""
    needs = set(needs)
    wanted = {"spatial": "spatial", "classes": "probabilities", "predicted": "probabilities", "score": "probabilities"}
    for need, output in wanted.items():
        if need in needs and output not in extractor.outputs:
            raise ValueError(f"features: got {extractor.identifier}, which has no {output}, allowed for these metrics: features with it")


def collect(stream: ImageStream, extractor: FeatureExtractor, needs: Iterable[str], *, max_rows: int = MAX_ROWS, seed: int = 0,
            progress: Callable[[int], None] | None = None) -> Summary:
    """One pass over a stream.

    Args:
      needs: of NEEDS; "pixels" only with "rows".
      max_rows: most single images to keep; which ones is drawn from `seed` and the number of images.
      progress: called with the number of images done.
    Raises: ValueError for images that the extractor does not take (before any is read), fewer than 2, features that are not finite.
    """
    if stream.count < 2:
        raise ValueError(f"images: got {stream.count} in {stream.origin or 'the stream'}, allowed: 2 or more")
    check_needs(extractor, needs)
    extractor.check((stream.count, *stream.image_shape))
    collector = _Collector(stream, needs, max_rows=max_rows, seed=seed)
    digest, done = begin_hash((stream.count, *stream.image_shape)), 0
    for images in stream.read(extractor.batch):
        collector.add(images, extractor.all(images))
        digest.update(np.ascontiguousarray(images).data)
        done += len(images)
        if progress is not None:
            progress(done)
    assert done == stream.count, f"{done} of {stream.count} images came"
    return collector.result(digest=end_hash(digest, stream.labels), extractor=extractor)
