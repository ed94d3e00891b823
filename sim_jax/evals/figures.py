"""The metrics by name: what each needs of samples and reference (statistics.NEEDS), and its figures.

    fd         Frechet distance (FID on Inception features), beside the value that perfect samples would show, `fd_bias`
    fd_inf     extrapolated to infinitely many samples (bias.py)
    sfd        the same on spatial features (sFID: Nash et al. 2021, https://arxiv.org/abs/2103.03841)
    kd         kernel distance (KID on Inception features)
    is         Inception score
    pr         precision, recall (k = 3), density, coverage (k = 5)
    class      class agreement, and class balance
    class_fd   Frechet distance within each class
    floor      the distance between halves of the reference, and the `fd` to expect from it of perfect samples
    nearest    nearest training images: memorisation
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from sim_jax.evals import bias, classes, frechet, kernel, memorisation
from sim_jax.evals.precision_recall import precision_recall
from sim_jax.evals.quality import halves_distance
from sim_jax.evals.statistics import Summary

_K, _DENSITY_K = 3, 5
ALIASES = {"fid": "fd", "sfid": "sfd", "kid": "kd", "fid_inf": "fd_inf"}


class Figures(NamedTuple):
    """numbers: {name: value}; details: anything for JSON; pictures: {name: uint8 [H,W,C]}."""

    numbers: dict[str, float]
    details: dict[str, Any] = {}
    pictures: dict[str, np.ndarray] = {}


class Metric(NamedTuple):
    """compute: (samples, reference or None, seed) -> Figures; needs: of both; of_reference: what of that the reference must have."""

    compute: Callable[[Summary, Summary, int], Figures]
    needs: tuple[str, ...]
    of_reference: tuple[str, ...]


def _fd(samples: Summary, reference: Summary, seed: int) -> Figures:
    numbers = {"fd": frechet.distance(samples.features, reference.features)}
    return Figures(numbers | {"fd_bias": bias.expected_bias(reference.features.eigenvalues, samples.count, reference.features.count)})


def _fd_inf(samples: Summary, reference: Summary, seed: int) -> Figures:
    return Figures(bias.extrapolate(samples.rows.features, reference.features, seed=seed))


def _sfd(samples: Summary, reference: Summary, seed: int) -> Figures:
    return Figures({"sfd": frechet.distance(samples.spatial, reference.spatial)})


def _kd(samples: Summary, reference: Summary, seed: int) -> Figures:
    return Figures(kernel.kernel_distance(reference.rows.features, samples.rows.features, seed=seed))


def _is(samples: Summary, reference: Summary | None, seed: int) -> Figures:
    return Figures(dict(samples.score))


def _pr(samples: Summary, reference: Summary, seed: int) -> Figures:
    return Figures(precision_recall(reference.rows.features, samples.rows.features, k=_K, density_k=_DENSITY_K))


def _class(samples: Summary, reference: Summary, seed: int) -> Figures:
    numbers = {} if samples.agreement is None else {"class_agreement": samples.agreement}
    if reference.agreement is not None:
        numbers["real_class_agreement"] = reference.agreement
    details = {"predicted": samples.predicted.tolist(), "real_predicted": np.asarray(reference.predicted).tolist()}
    return Figures(numbers | classes.balance(samples.predicted, reference.predicted), details)


def _class_fd(samples: Summary, reference: Summary, seed: int) -> Figures:
    numbers, each = classes.class_distances(samples.classes, reference.classes)
    return Figures(numbers, {"class_fd": each})


def _floor(samples: Summary, reference: Summary, seed: int) -> Figures:
    rows = reference.rows
    halves = halves_distance(rows.features, None if samples.label_counts is None else rows.labels, seed=seed, splits=8)
    return Figures({"real_halves_fd": halves, "noise_floor": halves * (1.0 + len(rows.features) / samples.count) / 4.0})


def _nearest(samples: Summary, reference: Summary, seed: int) -> Figures:
    numbers, picture = memorisation.memorisation(samples.rows.features, samples.rows.pixels, reference.rows.features, reference.rows.pixels)
    return Figures(numbers, pictures={"nearest": picture})


METRICS: dict[str, Metric] = {
    "fd": Metric(_fd, ("features",), ("features",)),
    "fd_inf": Metric(_fd_inf, ("rows",), ("features",)),
    "sfd": Metric(_sfd, ("spatial",), ("spatial",)),
    "kd": Metric(_kd, ("rows",), ("rows",)),
    "is": Metric(_is, ("score",), ()),
    "pr": Metric(_pr, ("rows",), ("rows",)),
    "class": Metric(_class, ("predicted",), ("predicted",)),
    "class_fd": Metric(_class_fd, ("classes",), ("classes",)),
    "floor": Metric(_floor, (), ("rows",)),
    "nearest": Metric(_nearest, ("rows", "pixels"), ("rows", "pixels")),
}


def parse(names: str | Iterable[str]) -> tuple[str, ...]:
    """The metrics named in "fd,kd" or ("fd", "kd"), in the table's order. Raises: ValueError for an unknown one, or none."""
    names = names.split(",") if isinstance(names, str) else names
    wanted = {ALIASES.get(name.strip().lower(), name.strip().lower()) for name in names}
    unknown = sorted(wanted - METRICS.keys())
    if unknown or not wanted:
        raise ValueError(f"metrics: got {unknown[0] if unknown else 'nothing'!r}, allowed: {', '.join(METRICS)}")
    return tuple(name for name in METRICS if name in wanted)


def needs(metrics: Iterable[str], *, of_reference: bool) -> frozenset[str]:
    """What must be collected of the samples, or of the reference."""
    return frozenset(need for name in metrics for need in (METRICS[name].of_reference if of_reference else METRICS[name].needs))
