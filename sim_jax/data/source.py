"""What every data set looks like to the rest of the program: random access to uint8 images and int labels.

A source has `len`, `source[i] -> {"image": uint8 [H,W,C], "label": int}`, `resolution` (H = W), `channels`
and `num_classes` (0: no labels, every label is then 0). It knows nothing of order, epochs or processes: see
pipeline.py.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np

from sim_jax.data.captions import Captions

CACHE_BYTES = 1 << 30   # data sets of at most 1 GiB, decoded, are kept in memory: CIFAR-10 takes 0.15


class Source(Protocol):
    """Sources whose images have captions also have `captions` (see captions.py), caption i of image i."""

    resolution: int
    channels: int
    num_classes: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict: ...


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySource:
    """A source held in memory: images uint8 [N,R,R,C], labels int32 [N] in [0, num_classes), and captions, one each."""

    images: np.ndarray
    labels: np.ndarray
    num_classes: int
    captions: Captions | None = None

    def __post_init__(self):
        shape, dtype = self.images.shape, self.images.dtype
        if len(shape) != 4 or shape[1] != shape[2] or dtype != np.uint8:
            raise ValueError(f"images: got {dtype} {shape}, allowed: uint8 [N,R,R,C]")
        if self.labels.shape != shape[:1] or self.labels.dtype != np.int32:
            raise ValueError(f"labels: got {self.labels.dtype} {self.labels.shape}, "
                             f"allowed: int32 ({shape[0]},)")
        if self.captions is not None and len(self.captions) != shape[0]:
            raise ValueError(f"captions: got {len(self.captions)}, allowed: {shape[0]}, one for each image")

    resolution = property(lambda self: self.images.shape[1])
    channels = property(lambda self: self.images.shape[3])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        return {"image": self.images[index], "label": int(self.labels[index])}


def gather(source: Source, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The samples at `indices` [n], in that order: images uint8 [n,R,R,C] and labels int32 [n]."""
    if isinstance(source, ArraySource):
        return source.images[indices], source.labels[indices]
    examples = [source[int(i)] for i in indices]
    return (np.stack([example["image"] for example in examples]),
            np.array([example["label"] for example in examples], np.int32))


def in_memory(source: Source) -> ArraySource:
    """Decodes every sample once. Anything wrong with any sample is raised here, before training."""
    if isinstance(source, ArraySource):
        return source
    images = np.empty([len(source), source.resolution, source.resolution, source.channels], np.uint8)
    labels = np.empty([len(source)], np.int32)
    for i in range(len(source)):   # threads would not help: decoding small images mostly holds Python's lock
        example = source[i]
        images[i], labels[i] = example["image"], example["label"]
    return ArraySource(images, labels, source.num_classes)


def cache(source: Source, cache_bytes: int) -> Source:
    """`source` decoded into memory if that takes at most `cache_bytes`, else `source` itself."""
    size = len(source) * source.resolution ** 2 * source.channels
    return in_memory(source) if size <= cache_bytes else source


def pad_image(image: np.ndarray, size: int) -> np.ndarray:
    """Pads [H,W,C] with black (0) to [size,size,C], evenly; the odd pixel goes to the bottom and right."""
    extra = [(size - n) // 2 for n in image.shape[:2]]
    return np.pad(image, [(before, size - n - before) for n, before in zip(image.shape, extra)] + [(0, 0)])


def check_padding(pad_to: int | None, resolution: int) -> int:
    """The resolution after padding `resolution` to `pad_to` (None: no padding)."""
    if pad_to is not None and pad_to < resolution:
        raise ValueError(f"pad_to: got {pad_to}, allowed: at least the images' own resolution, {resolution}")
    return pad_to or resolution


def check_source(source: Source, where: str, *, resolution: int | None, channels: int | None,
                 label_dim: int | None) -> Source:
    """Raises ValueError unless `source` serves what the networks expect (None: anything goes)."""
    if len(source) == 0:
        raise ValueError(f"data: got no images in {where}, allowed: at least one")
    if resolution is not None and source.resolution != resolution:
        raise ValueError(f"resolution: got {source.resolution}x{source.resolution} images in {where}, "
                         f"allowed: {resolution}x{resolution}")
    if channels is not None and source.channels != channels:
        raise ValueError(f"channels: got {source.channels} in {where}, allowed: {channels}")
    if label_dim and source.num_classes == 0:
        raise ValueError(f"label_dim: got {label_dim}, allowed: 0, as {where} has no labels")
    if label_dim and source.num_classes > label_dim:
        raise ValueError(f"label_dim: got {label_dim}, allowed: at least {source.num_classes}, "
                         f"the number of classes in {where}")
    return source
