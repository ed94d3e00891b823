"""Whether samples are copies: the nearest training image of each, in pixels and in features.

A sample s with nearest training image r counts as close where d(s, r) < d(r, r'), r' being r's nearest other training image: it
then lies nearer to r than anything in the data does. Applied to a training image that is left out in turn, the same test asks
whether two images are each other's nearest, which is the share to expect of samples that are new (the two are the same event for
exchangeable points). Copies push the share to one; samples off the data push it to zero.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sim_jax import images

_BLOCK_ELEMENTS = 1 << 22
_SPARE = 2   # candidates beyond those wanted, as the first search is in float32


class Nearest(NamedTuple):
    """index: [N,k] of the k nearest points; distance: [N,k], ascending."""

    index: np.ndarray
    distance: np.ndarray


def nearest(points: np.ndarray, others: np.ndarray, *, k: int = 1, same: bool = False) -> Nearest:
    """The k nearest of `others` [M,D] to each of `points` [N,D], by Euclidean distance.

    Candidates are found in float32; their distances, and the order, are then exact. `same`: both are one set, and a point is not its
    own neighbour (but another point at the same place is). Raises ValueError where M has not enough points.
    """
    if len(others) < k + same:
        raise ValueError(f"nearest: got {len(others)} images, allowed: {k + same} or more")
    centre = others.mean(axis=0, dtype=np.float64).astype(np.float32)
    targets = others.astype(np.float32) - centre[None]
    norms = np.einsum("nd,nd->n", targets, targets)
    width = min(k + _SPARE, len(others) - same)
    index, distance = np.empty((len(points), k), np.int64), np.empty((len(points), k))
    step = max(1, _BLOCK_ELEMENTS // len(others))
    for start in range(0, len(points), step):
        rows = slice(start, min(start + step, len(points)))
        squared = norms[None] - 2.0 * ((points[rows].astype(np.float32) - centre[None]) @ targets.T)
        if same:
            squared[np.arange(len(squared)), np.arange(rows.start, rows.stop)] = np.inf
        candidates = np.argpartition(squared, width - 1, axis=1)[:, :width]
        exact = np.linalg.norm(others[candidates].astype(np.float64) - points[rows, None].astype(np.float64), axis=2)
        order = np.argsort(exact, axis=1, kind="stable")[:, :k]
        index[rows], distance[rows] = (np.take_along_axis(values, order, axis=1) for values in (candidates, exact))
    return Nearest(index, distance)


def compare(points: np.ndarray, real: np.ndarray) -> tuple[dict[str, float], Nearest, np.ndarray]:
    """Figures of one space, and what they come from.

    Args:
      points, real: [N,D] samples, [M,D] training images, M >= 3.
    Returns: ({"share", "share_real", "ratio": median distance over the median from real to real}, the samples' nearest with k = 1,
      and how near each is, [N]: d(s, r) / d(r, r')).
    """
    found, among = nearest(points, real), nearest(real, real, k=2, same=True)
    partner = among.index[:, 0]
    mutual = among.index[partner, 0] == np.arange(len(real))
    # r' must not be the image that is left out: where the two are each other's nearest, it is the second nearest.
    own = among.distance[partner, np.where(mutual, 1, 0)]
    distance, limit = found.distance[:, 0], among.distance[found.index[:, 0], 0]
    typical = float(np.median(among.distance[:, 0]))
    figures = {"share": float((distance < limit).mean()), "share_real": float((among.distance[:, 0] < own).mean()),
               "ratio": float(np.median(distance)) / typical if typical else float("nan")}
    return figures, found, distance / np.where(limit > 0, limit, 1.0)


def memorisation(features: np.ndarray, pixels: np.ndarray, real_features: np.ndarray, real_pixels: np.ndarray, *,
                 show: int = 12) -> tuple[dict[str, float], np.ndarray]:
    """Figures in both spaces, and a picture of the samples that are nearest to a training image.

    Args:
      features, pixels: [N,F], uint8 [N,H,W,C], the samples.
      real_features, real_pixels: [M,F], uint8 [M,H,W,C], the training images.
      show: how many samples the picture has, the most suspicious first.
    Returns: ({"nearest_pixel_share", "nearest_pixel_share_real", "nearest_pixel_ratio", the same of "feature", "copies": samples
      that equal a training image in every pixel}, uint8 [H',W',C] of triples sample | nearest in pixels | nearest in features).
    """
    pixel_figures, by_pixel, pixel_ratio = compare(pixels.reshape(len(pixels), -1), real_pixels.reshape(len(real_pixels), -1))
    feature_figures, by_feature, feature_ratio = compare(features, real_features)
    figures = {f"nearest_{space}_{name}": value for space, found in (("pixel", pixel_figures), ("feature", feature_figures))
               for name, value in found.items()}
    figures["copies"] = int((by_pixel.distance[:, 0] == 0).sum())
    worst = np.argsort(np.minimum(pixel_ratio, feature_ratio), kind="stable")[:show]
    triples = [pixels[worst], real_pixels[by_pixel.index[worst, 0]], real_pixels[by_feature.index[worst, 0]]]
    return figures, images.grid(np.concatenate(triples, axis=2), columns=4, scale=None, pad=3)
