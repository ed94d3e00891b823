"""Figures of drawn scenes beside their adherence: a Frechet distance that needs no trained network, and the diversity within a caption.

Features. One layer of 64 fixed random filters of 5 x 5 x 3 pixels (random signs / sqrt(75)), stride 2, rectified, and averaged over the
four quarters of the image: 256 numbers, which know colours, edges and roughly where they are. Distances in them compare with each other
and with the distance between two halves of real drawings, with nothing else.

Diversity. Of n images of one caption, the mean over pairs of the root mean squared difference of their pixels, in [-1, 1]; and as
`places` the standard deviation of where an object stands, in pixels. Both as shares of what drawings of the same captions have:
1 is the drawings' own variety, 0 one image over and over.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Sequence

import numpy as np

from sim_jax.data.scenes_text import signs
from sim_jax.evals import adherence, frechet

_FILTERS, _KERNEL, _STRIDE = 64, 5, 2


@functools.cache
def _filters() -> np.ndarray:
    """[5 * 5 * 3, 64] float32."""
    inputs = _KERNEL**2 * 3
    return signs(5, inputs, _FILTERS) / np.float32(inputs) ** 0.5


def features(images: np.ndarray) -> np.ndarray:
    """The module docstring's features: uint8 [N,H,W,3] -> float32 [N,256]."""
    x = images.astype(np.float32) / np.float32(127.5) - 1
    windows = np.lib.stride_tricks.sliding_window_view(x, (_KERNEL, _KERNEL), (1, 2))[:, ::_STRIDE, ::_STRIDE]
    maps = np.maximum(windows.reshape(*windows.shape[:3], -1) @ _filters(), 0)
    halves = [np.array_split(part, 2, axis=2) for part in np.array_split(maps, 2, axis=1)]
    return np.concatenate([quarter.mean((1, 2)) for pair in halves for quarter in pair], 1)


def frechet_distance(images: np.ndarray, reference: np.ndarray) -> float:
    """The Frechet distance of two sets of images, uint8 [N,H,W,3] and [M,H,W,3], in these features."""
    return frechet.statistics_distance(*(frechet.feature_statistics(features(a)) for a in (images, reference)))


def pixel_distance(images: np.ndarray) -> float:
    """Mean over pairs of the root mean squared difference: uint8 [n,H,W,C] -> number."""
    x = images.reshape(len(images), -1).astype(np.float64) / 127.5
    squares = np.sum(x**2, 1)
    squared = np.maximum(squares[:, None] + squares[None] - 2 * x @ x.T, 0) / x.shape[1]
    return float(np.sqrt(squared)[np.triu_indices(len(x), 1)].mean())


def _spread(images: np.ndarray) -> float:
    """Standard deviation of an object's place in pixels, mean over the objects of those images [n,...] that have the most frequent kinds.

    Objects of a kind are told apart by their order from the left. 0 where fewer than two images are left.
    """
    scenes = [sorted((o.colour, o.shape, o.x, o.y) for o in found) for found in adherence.read(images) if found and all(o.shape for o in found)]
    kinds = [tuple(o[:2] for o in found) for found in scenes]
    if not kinds:
        return 0.0
    most = collections.Counter(kinds).most_common(1)[0][0]
    places = np.array([[o[2:] for o in found] for found, kind in zip(scenes, kinds) if kind == most], np.float64)
    return float(np.sqrt(places.var(0).mean()))


def diversity(images: np.ndarray, drawings: np.ndarray) -> dict[str, float]:
    """How much variety is left within captions.

    Args:
      images: uint8 [captions,n,16,16,3], n >= 2 samples of each caption.
      drawings: uint8 [captions,m,16,16,3], m >= 2 drawings of the same captions.
    Returns: {"pixels": share, "places": share} of the drawings' variety, means over captions.
    Raises: ValueError for other shapes.
    """
    if images.ndim != 5 or drawings.ndim != 5 or len(images) != len(drawings) or min(images.shape[1], drawings.shape[1]) < 2:
        raise ValueError(f"images, drawings: got {images.shape} and {drawings.shape}, allowed: [captions,n,16,16,3] of the same captions, n >= 2")

    def share(measure) -> float:
        return float(np.mean([measure(part) for part in images]) / np.mean([measure(part) for part in drawings]))

    return {"pixels": share(pixel_distance), "places": share(_spread)}


def attributes(images: np.ndarray, prompts: Sequence[str]) -> dict[str, float]:
    """`adherence.adherence`, and the share of images whose every object has a shape, "legible"."""
    legible = np.mean([all(o.shape for o in found) and bool(found) for found in adherence.read(images)])
    return adherence.adherence(images, prompts) | {"legible": float(legible)}
