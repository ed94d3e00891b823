"""What samples are compared with: a data set, or a file of its statistics.

    digits, X.zip, folder, X.npz with images     measured now, in the extractor's features
    X.npz with mu, sigma                         EDM's statistics; ADM's have mu_s, sigma_s and 10,000 images arr_0 besides
    X.npz written here                           EDM's names, and whatever else the metrics named needed; the features' identifier, the
                                                 hash and the name of the images, and their number, as JSON under `about`

Of a foreign file nobody can know which features it was measured in: only their number is checked.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from sim_jax.evals import statistics, streams
from sim_jax.evals.features import FeatureExtractor
from sim_jax.evals.frechet import Gaussian
from sim_jax.evals.statistics import Rows, Summary
from sim_jax.files import write_atomically

_ABOUT, _VERSION = "about", 1
_GAUSSIANS = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


def open_reference(path: str, extractor: FeatureExtractor, needs: Iterable[str], *, image_shape: tuple[int, int, int] | None = None,
                   max_rows: int = statistics.MAX_ROWS, seed: int = 0, progress: Callable[[int, int], None] | None = None) -> Summary:
    """The reference at `path`, with everything in `needs` (statistics.NEEDS; "score" is the samples' own and not asked of it).

    Args:
      image_shape: of the samples, for an extractor that takes any.
      max_rows, seed: of `statistics.collect`.
      progress: called with the number of images done, and of all.
    Raises: ValueError for a path that is missing or of another kind, damaged files, other features, or where something is not in it.
    """
    needs = set(needs) - {"score"}
    if path.lower().endswith(".npz") and os.path.isfile(path):
        arrays = _read_small(path)
        if _ABOUT in arrays:
            return _ours(path, arrays, extractor, needs)
        if "mu" in arrays or "sigma" in arrays:
            return _foreign(path, arrays, extractor, needs, image_shape, max_rows=max_rows, seed=seed, progress=progress)
    stream = streams.open_stream(path, key="reference")
    return _collect(stream, extractor, needs, max_rows=max_rows, seed=seed, progress=progress)


def write_reference(path: str | Path, summary: Summary) -> Path:
    """Writes a summary as .npz, atomically. Raises: ValueError for another suffix, or a path that cannot be written."""
    if Path(path).suffix != ".npz":
        raise ValueError(f"write-reference: got {str(path)!r}, allowed: a name that ends in .npz")
    about = {"version": _VERSION, "extractor": summary.extractor, "hash": summary.hash, "origin": summary.origin, "count": summary.count,
             "agreement": summary.agreement, "label_counts": None if summary.label_counts is None else summary.label_counts.tolist()}
    arrays: dict[str, Any] = {_ABOUT: np.array(json.dumps(about))}
    for name, keys in _GAUSSIANS.items():
        if getattr(summary, name) is not None:
            arrays |= dict(zip(keys, (getattr(summary, name).mean, getattr(summary, name).covariance)))
    if summary.classes is not None:
        labels = sorted(summary.classes)
        arrays |= {"class_labels": np.array(labels), "class_counts": np.array([summary.classes[k].count for k in labels]),
                   "class_mu": np.stack([summary.classes[k].mean for k in labels]),
                   "class_sigma": np.stack([summary.classes[k].covariance for k in labels])}
    if summary.predicted is not None:
        arrays["predicted"] = summary.predicted
    if summary.rows is not None:
        arrays |= {f"row_{name}": value for name, value in summary.rows._asdict().items() if value is not None}
    return write_atomically(path, lambda file: np.savez(file, **arrays), key="write-reference")


def _collect(stream: streams.ImageStream, extractor: FeatureExtractor, needs: set[str], *, max_rows: int, seed: int, progress) -> Summary:
    tick = None if progress is None else lambda done: progress(done, stream.count)
    return statistics.collect(stream, extractor, needs, max_rows=max_rows, seed=seed, progress=tick)


def _read_small(path: str) -> dict[str, np.ndarray]:
    """An .npz's arrays, but for images and labels, which are streamed."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files if name not in ("arr_0", "arr_1", "images", "labels")}
    except streams.READ_ERRORS as error:
        raise ValueError(f"reference: {path} is not a readable .npz, it may be truncated or corrupt ({error})") from None


def _gaussian(path: str, arrays: dict[str, np.ndarray], keys: tuple[str, str], count: int | None) -> Gaussian:
    mean, covariance = (arrays.get(key) for key in keys)
    if mean is None or covariance is None:
        raise ValueError(f"reference: got {', '.join(sorted(arrays))} in {path}, allowed: both {' and '.join(keys)}")
    if mean.ndim != 1 or covariance.shape != (mean.size, mean.size) or mean.dtype.kind != "f" or covariance.dtype.kind != "f":
        raise ValueError(f"reference: got {keys[0]} {mean.dtype} {list(mean.shape)} and {keys[1]} {list(covariance.shape)} in {path}, "
                         "allowed: floating point [F] and [F,F]")
    mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"reference: got NaN or infinity in {keys[0]} or {keys[1]} of {path}, allowed: finite numbers")
    if (np.diagonal(covariance) < 0).any() or np.abs(covariance - covariance.T).max() > 1e-6 * np.abs(covariance).max():
        raise ValueError(f"reference: got a {keys[1]} in {path} that is no covariance, allowed: symmetric and >= 0 on the diagonal")
    return Gaussian(mean, covariance, count)


def _missing(path: str, lacking: Iterable[str]) -> ValueError:
    return ValueError(f"reference: {path} has no {', '.join(sorted(lacking))}, which these metrics need; allowed: a .zip, folder or .npz "
                      "of images, or statistics written with the same metrics")


def _ours(path: str, arrays: dict[str, np.ndarray], extractor: FeatureExtractor, needs: set[str]) -> Summary:
    try:
        about = json.loads(str(arrays[_ABOUT]))
        if about["version"] != _VERSION:
            raise ValueError(f"version {about['version']}")
        count, known = about["count"], {key: about[key] for key in ("hash", "extractor", "origin", "agreement")}
        if about["label_counts"] is not None:
            known["label_counts"] = np.array(about["label_counts"], np.int64)
        out: dict[str, Any] = {name: _gaussian(path, arrays, keys, count) for name, keys in _GAUSSIANS.items() if keys[0] in arrays}
        if "class_labels" in arrays:
            labels, counts, means, covariances = (arrays[f"class_{name}"] for name in ("labels", "counts", "mu", "sigma"))
            out["classes"] = {int(label): Gaussian(means[i], covariances[i], int(counts[i])) for i, label in enumerate(labels)}
        if "row_index" in arrays:
            out["rows"] = Rows(**{name: arrays.get(f"row_{name}") for name in Rows._fields})
    except (TypeError, KeyError, IndexError, json.JSONDecodeError) as error:
        raise ValueError(f"reference: {path} is damaged or was not written by --write-reference ({error})") from None
    if known["extractor"] != extractor.identifier:
        raise ValueError(f"reference: got statistics of {known['extractor']} in {path}, allowed: of {extractor.identifier}, the features")
    summary = Summary(count=count, predicted=arrays.get("predicted"), **known, **out)
    lacking = {need for need in needs - {"pixels"} if getattr(summary, need) is None}
    if "pixels" in needs and (summary.rows is None or summary.rows.pixels is None):
        lacking.add("pixels")
    if lacking:
        raise _missing(path, lacking)
    return summary


def _foreign(path: str, arrays: dict[str, np.ndarray], extractor: FeatureExtractor, needs: set[str],
             image_shape: tuple[int, int, int] | None, **knobs) -> Summary:
    gaussians = {name: _gaussian(path, arrays, keys, None) for name, keys in _GAUSSIANS.items() if name in needs and keys[0] in arrays}
    rest = needs - gaussians.keys()
    if rest and _has_images(path):
        summary = _collect(streams.open_stream(path, key="reference"), extractor, rest, **knobs)
    elif rest:
        raise _missing(path, rest)
    else:
        summary = Summary(count=None, hash="", extractor="", origin=os.path.basename(path))
    if gaussians:
        shape = tuple(want or got for want, got in zip(extractor.image_shape, image_shape or (32, 32, 3)))
        outputs = extractor.all(np.zeros((1, *shape), np.uint8))
        for name, gaussian in gaussians.items():
            if gaussian.mean.size != outputs[name].shape[1]:
                raise ValueError(f"reference: got statistics of {gaussian.mean.size} {name} in {path}, allowed: {outputs[name].shape[1]}, "
                                 f"as {extractor.identifier} has")
    digest = hashlib.sha256()
    for key in sorted(arrays):
        digest.update(np.ascontiguousarray(arrays[key]).data)
    return dataclasses.replace(summary, count=None, hash=digest.hexdigest()[:12], **gaussians)


def _has_images(path: str) -> bool:
    with np.load(path, allow_pickle=False) as file:
        return bool({"arr_0", "images"} & set(file.files))
