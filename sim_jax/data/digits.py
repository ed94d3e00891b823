"""The embedded default: 1,797 handwritten digits of 8x8 pixels, shipped inside the package.

Source: Optical Recognition of Handwritten Digits (optdigits), E. Alpaydin and C. Kaynak, 1998, UCI Machine
Learning Repository, https://doi.org/10.24432/C50P49, licence CC BY 4.0. These are the 1,797 images of its
test set with values 0..16, in the order of scikit-learn's `load_digits`.
"""

from __future__ import annotations

import pathlib

import numpy as np

from sim_jax.data import source

NUM_CLASSES = 10
_FILE = pathlib.Path(__file__).parent.parent / "assets" / "digits.npz"


def load(*, resolution: int | None = None, channels: int | None = None,
         label_dim: int | None = None) -> source.ArraySource:
    """The digits as uint8 [1797,8,8,1], value v of 0..16 as round(255 v / 16), and labels int32 [1797].

    The arguments are what the caller expects (None: anything); ValueError where the digits are otherwise.
    """
    with np.load(_FILE) as file:
        values, labels = file["images"], file["labels"]
    images = np.round(values.astype(np.float64) * 255 / 16).astype(np.uint8)[..., None]
    digits = source.ArraySource(images, labels.astype(np.int32), NUM_CLASSES)
    return source.check_source(digits, "digits", resolution=resolution, channels=channels,
                               label_dim=label_dim)


def halves(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Splits samples into two fixed halves with the same number of each class (up to one).

    For the distance between two halves of the real data, the yardstick beside every measured distance.

    Args:
      labels: int [N].

    Returns:
      two sorted int64 index arrays that partition range(N); the samples of a class alternate between them.
    """
    parts: tuple[list, list] = ([], [])
    for label in np.unique(labels):
        for i in np.flatnonzero(labels == label):
            parts[len(parts[0]) > len(parts[1])].append(i)
    return np.sort(parts[0]).astype(np.int64), np.sort(parts[1]).astype(np.int64)
