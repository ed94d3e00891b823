"""The quality table: every figure of a set of samples beside the protocol that it was measured under.

Frechet distances are biased upwards by finite counts: near equality of the two laws the expectation is
proportional to 1/n + 1/m. The distance between two halves of the M real images (2/M + 2/M) is therefore the
natural floor, and scaled by (1/N + 1/M) / (4/M) it is what N perfect samples against all M would show. Where
classes are known the halves get equally many of each, as samples of requested classes do; halves drawn
without regard to class differ in their class counts too (on the digits 0.63 instead of 0.39).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sim_jax.evals import frechet, streams
from sim_jax.evals.features import FeatureExtractor
from sim_jax.evals.precision_recall import precision_recall

_K, _DENSITY_K = 3, 5


def quality(images: np.ndarray, labels: np.ndarray | None, *, real_images: np.ndarray,
            real_labels: np.ndarray | None, features: FeatureExtractor,
            label_scheme: str | None = None) -> dict[str, Any]:
    """Measures samples against real images.

    Args:
      images: uint8 [N,H,W,C], the samples, N >= 4.
      labels: int [N], the classes they were asked for, or None.
      real_images: uint8 [M,H,W,C], the reference, M >= 6.
      real_labels: int [M], its classes, or None; they enter its hash and `real_class_agreement`.
      features: such as `digits_features()`.
      label_scheme: how `labels` were drawn, quoted as it is; by default only whether there were any.
    Returns:
      A dict ready for JSON. fd: Frechet distance of all samples to all real images. noise_floor: the `fd` to
      expect of N perfect samples (in the reference's class proportions where both have labels).
      class_agreement: share of samples classified as asked for (None without labels). real_class_agreement:
      the same of the real images. precision, recall (k = 3), density, coverage (k = 5). The protocol: count,
      reference_count, reference (its hash), features (their identifier), label_scheme, neighbours.
    Raises:
      ValueError: on shapes, types, counts or labels that do not fit.
    """
    sample_features, probabilities = features(images)
    real_features, real_probabilities = features(real_images)
    agreement = _agreement("labels", labels, probabilities)
    real_agreement = _agreement("real_labels", real_labels, real_probabilities)
    neighbours = precision_recall(real_features, sample_features, k=_K, density_k=_DENSITY_K)
    halves = halves_distance(real_features, None if labels is None else real_labels, seed=0, splits=8)
    count, reference_count = len(images), len(real_images)
    return {
        "fd": frechet.statistics_distance(frechet.feature_statistics(sample_features),
                                          frechet.feature_statistics(real_features)),
        "noise_floor": halves * (1.0 + reference_count / count) / 4.0,
        "class_agreement": agreement,
        "real_class_agreement": real_agreement,
        **neighbours,
        "count": count,
        "reference_count": reference_count,
        "reference": images_hash(real_images, real_labels),
        "features": features.identifier,
        "label_scheme": label_scheme or ("none" if labels is None else "given"),
        "neighbours": f"precision and recall k={_K}, density and coverage k={_DENSITY_K}",
    }


def real_halves_fd(real_images: np.ndarray, real_labels: np.ndarray | None = None, *,
                   features: FeatureExtractor, seed: int = 0, splits: int = 8) -> float:
    """Frechet distance between two random halves of real images, the mean of `splits` splits.

    Args:
      real_images: uint8 [M,H,W,C], M >= 4.
      real_labels: int [M]: the halves get equally many of each class (up to one); None: regardless of class.
    """
    real_features, probabilities = features(real_images)
    _agreement("real_labels", real_labels, probabilities)
    return halves_distance(real_features, real_labels, seed=seed, splits=splits)


def images_hash(images: np.ndarray, labels: np.ndarray | None = None) -> str:
    """The first 12 hex digits of the SHA-256 of uint8 images, their shape and, where given, int labels."""
    digest = streams.begin_hash(np.shape(images))
    digest.update(np.ascontiguousarray(images, np.uint8).data)
    return streams.end_hash(digest, labels)


def halves_distance(features: np.ndarray, labels: np.ndarray | None, *, seed: int, splits: int) -> float:
    """`real_halves_fd` of features [M,F]; halves with equally many of each of labels int [M], where given."""
    if splits < 1 or len(features) < 4:
        raise ValueError(f"splits: got {splits} of {len(features)} images, allowed: 1 or more of 4 or more")
    generator = np.random.default_rng(seed)
    distances = []
    for _ in range(splits):
        order = generator.permutation(len(features))
        if labels is not None:
            order = order[np.argsort(np.asarray(labels)[order], kind="stable")]
        halves = (frechet.feature_statistics(features[order[start::2]]) for start in (0, 1))
        distances.append(frechet.statistics_distance(*halves))
    return float(np.mean(distances))


def _agreement(name: str, labels: np.ndarray | None, probabilities: np.ndarray) -> float | None:
    if labels is None:
        return None
    labels = np.asarray(labels)
    count, classes = probabilities.shape
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{name}: got {labels.dtype} {labels.shape}, allowed: integers ({count},)")
    if not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(f"{name}: got {labels.min()}..{labels.max()}, allowed: 0..{classes - 1}")
    return float((probabilities.argmax(axis=1) == labels).mean())
