"""Images one chunk at a time, so that what is measured never has to fit into memory.

    digits              the embedded digits
    X.zip, a folder     EDM's dataset layout, with labels where it has them
    X.npz               `images` or ADM's `arr_0`, uint8 [N,H,W,C]; `labels` or `arr_1`, where a -1 means that there are none
    a generator         `sampled`: sample i depends on (seed, i) alone, whatever the chunks

The hash of a set of images is over their shape, pixels and labels in their order: the same for a zip, a folder and an .npz.
"""

from __future__ import annotations

import hashlib
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from sim_jax import sharding
from sim_jax.data import digits
from sim_jax.data.images import open_images
from sim_jax.data.source import Source, gather
from sim_jax.evals.generate import ImageSampler
from sim_jax.types import Params

_NPZ = (("images", "labels"), ("arr_0", "arr_1"))
_Read = Callable[[np.ndarray, int], Iterator[np.ndarray]]
READ_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, OSError, KeyError, ValueError, NotImplementedError, RuntimeError)


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageStream:
    """N images that can be gone through, more than once, in order.

    Attributes:
      count: N.
      image_shape: (H, W, C).
      read: (size) -> chunks uint8 [n_i,H,W,C] with sum n_i = N; files give `size` images at a time, samples come in their own batches.
      labels: int32 [N], or None.
      origin: what to call them in a report.
    """

    count: int
    image_shape: tuple[int, int, int]
    read: Callable[[int], Iterator[np.ndarray]]
    labels: np.ndarray | None = None
    origin: str = ""


def open_stream(path: str, *, num: int | None = None, seed: int = 0, key: str = "images") -> ImageStream:
    """The images at `path` (module docstring).

    Args:
      num: how many of them: a subset that EDM's `fid.py --num --seed` would take, in the order of the file; None takes all.
      key: what to call `path` in messages.
    Raises: ValueError for a path that is missing or of another kind, damaged files, other shapes, fewer than `num` images.
    """
    if path != "digits" and not os.path.exists(path):
        raise ValueError(f"{key}: got {path!r}, which does not exist, allowed: a .zip or folder of images, an .npz, or digits")
    if path.lower().endswith(".npz") and os.path.isfile(path):
        count, image_shape, labels, read = _open_npz(path, key)
    elif path == "digits" or os.path.isdir(path) or path.lower().endswith(".zip"):
        source = digits.load() if path == "digits" else open_images(path, cache_bytes=0)
        count, image_shape = len(source), (source.resolution, source.resolution, source.channels)
        labels = _labels(source) if source.num_classes else None
        read = lambda index, size: _read_source(source, index, size)
    else:
        raise ValueError(f"{key}: got {path!r}, allowed: a .zip or folder of images, an .npz, or digits")
    if num is not None and num > count:
        raise ValueError(f"{key}: got {count} images in {path}, allowed: {num} or more, as that many are to be measured")
    index = _subset(count, num, seed)
    labels = None if labels is None else labels[index]
    name = os.path.basename(path)
    return ImageStream(count=len(index), image_shape=image_shape, labels=labels, read=lambda size: read(index, size), origin=name)


def sampled(sampler: ImageSampler, params: Params, *, seed: int, count: int, start: int = 0, classes: np.ndarray | None = None,
            rounding: Callable[[np.ndarray], np.ndarray], batch: int, origin: str = "") -> ImageStream:
    """Samples start ... start + count - 1 of `seed`, drawn as they are read; nothing is kept.

    Args:
      sampler, params: the parameters on the sampler's devices.
      classes: int [count]; None draws them by (seed, index) as the sampler's latents say.
      rounding: float32 in [-1, 1] -> uint8.
      batch: images per program, over all devices; the last batch is padded.
    Raises (from reading): ValueError where the network gives NaN or infinity.
    """
    index = np.arange(start, start + count)
    classes = sampler.latents.classes_of(seed, index) if classes is None else np.asarray(classes, np.int32)

    def read(size: int) -> Iterator[np.ndarray]:
        for begin in range(0, count, batch):
            here = np.minimum(np.arange(begin, begin + batch), count - 1)   # the last sample again, as padding
            pixels = sharding.to_host(sampler.float_images(params, seed=seed, index=index[here], classes=classes[here]))
            pixels = pixels[:count - begin]
            wrong = int((~np.isfinite(pixels)).any(axis=(1, 2, 3)).sum())
            if wrong:
                raise ValueError(f"samples: got {wrong} of {len(pixels)} images with NaN or infinity, from sample {index[begin]} on, "
                                 "allowed: finite numbers; these weights are no trained network")
            yield rounding(pixels)

    labels = classes if sampler.latents.label_dim else None
    shape = rounding(np.zeros((1, *sampler.image_shape), np.float32)).shape[1:]
    return ImageStream(count=count, image_shape=shape, labels=labels, read=read, origin=origin)


def begin_hash(shape: tuple[int, ...]) -> Any:
    """A digest of images of `shape` (N, H, W, C), to be updated with their bytes in order."""
    return hashlib.sha256(f"{tuple(int(size) for size in shape)} ".encode())


def end_hash(digest: Any, labels: np.ndarray | None) -> str:
    """Its first 12 hex digits, once the labels are in it too."""
    if labels is not None:
        digest.update(np.asarray(labels).astype("<i4").tobytes())
    return digest.hexdigest()[:12]


def _subset(count: int, num: int | None, seed: int) -> np.ndarray:
    """Indices in order; fewer than all are drawn as EDM's data sets draw `max_size` of them."""
    index = np.arange(count)
    if num is None or num >= count:
        return index
    np.random.RandomState(seed % (1 << 31)).shuffle(index)
    return np.sort(index[:num])


def _labels(source: Source) -> np.ndarray:
    if hasattr(source, "labels"):
        return source.labels
    return gather(source, np.arange(len(source)))[1]


def _read_source(source: Source, index: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(index), size):
        yield gather(source, index[start:start + size])[0]


def _open_npz(path: str, key: str) -> tuple[int, tuple[int, int, int], np.ndarray | None, _Read]:
    """(count, image shape, labels, (index, size) -> chunks) of an .npz, whose images are never all in memory."""
    try:
        with np.load(path, allow_pickle=False) as file:
            names = set(file.files)
            found = next(((images, labels) for images, labels in _NPZ if images in names), None)
            labels = file[found[1]] if found and found[1] in names else None
        if found is not None:
            with zipfile.ZipFile(path) as archive, archive.open(f"{found[0]}.npy") as member:
                shape, dtype = _read_header(member)
    except READ_ERRORS as error:
        raise ValueError(f"{key}: {path} is not a readable .npz, it may be truncated or corrupt ({error})") from None
    if found is None:
        raise ValueError(f"{key}: got {path} with {', '.join(sorted(names)) or 'nothing'}, allowed: an .npz with images (or arr_0)")
    if dtype.kind == "f":
        _refuse_floats(path, found[0], key)
    if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape:
        raise ValueError(f"{key}: got {dtype} {list(shape)} in {path}, allowed: uint8 [N,H,W,C] with C = 1 or 3")
    if labels is not None and (labels.shape != shape[:1] or labels.dtype.kind not in "iu"):
        raise ValueError(f"{key}: got labels {labels.dtype} {list(labels.shape)} in {path}, allowed: integers [{shape[0]}]")
    if labels is not None:
        labels = None if (labels < 0).any() else labels.astype(np.int32)
    return shape[0], shape[1:], labels, lambda index, size: _read_npz(path, found[0], shape, index, size)


def _read_header(member: Any) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(member)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, column_major, dtype = header(member)
    if column_major and len(shape) > 1:
        raise ValueError("an array in Fortran's order")
    return shape, dtype


def _read_npz(path: str, name: str, shape: tuple[int, ...], index: np.ndarray, step: int) -> Iterator[np.ndarray]:
    size = math.prod(shape[1:])
    wanted = np.zeros(shape[0], bool)
    wanted[index] = True
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as member:
            _read_header(member)
            for start in range(0, shape[0], step):
                here = wanted[start:start + step]
                data = member.read(len(here) * size)
                if len(data) < len(here) * size:
                    raise EOFError(f"it ends at image {start + len(data) // size} of {shape[0]}")
                if here.any():
                    yield np.frombuffer(data, np.uint8).reshape(-1, *shape[1:])[here]
    except READ_ERRORS as error:
        raise ValueError(f"images: {path} is not a readable .npz, it may be truncated or corrupt ({error})") from None


def _refuse_floats(path: str, name: str, key: str) -> None:
    with np.load(path, allow_pickle=False) as file:
        pixels = file[name]
    wrong = int((~np.isfinite(pixels)).reshape(len(pixels), -1).any(axis=1).sum())
    what = f"{wrong} of {len(pixels)} images with NaN or infinity" if wrong else f"{pixels.dtype} images, whose range nobody can know,"
    raise ValueError(f"{key}: got {what} in {path}, allowed: uint8 [N,H,W,C]")
