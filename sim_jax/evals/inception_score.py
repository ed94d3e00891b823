"""Inception score: how sure a classifier is of each image, and how many classes it sees (Salimans et al. 2016, section 4).

https://arxiv.org/abs/1606.03498; with p the class probabilities of an image and q their mean over the images of a split,

    IS = exp(mean KL(p || q)) = exp(mean sum_k p_k log p_k - sum_k q_k log q_k),

whose mean and standard deviation over 10 splits are reported. The right-hand side needs sums only, so that images are streamed;
each goes into a split drawn in advance, because files may be sorted by class. The score depends on the number of images.
"""

from __future__ import annotations

import numpy as np


class InceptionScore:
    """Sums over images that come in chunks.

    Args:
      count: how many images will come, at least one for each split.
      splits, seed: how many parts, all of the same size (up to one), and which images go where.
    """

    def __init__(self, count: int, *, splits: int = 10, seed: int = 0):
        if not 1 <= splits <= count:
            raise ValueError(f"splits: got {splits} of {count} images, allowed: 1 to {count}")
        self._split = np.random.default_rng(seed).permutation(count) * splits // count
        self._sizes = np.bincount(self._split, minlength=splits)
        self._done, self._probabilities, self._entropies = 0, 0.0, np.zeros(splits)

    def add(self, probabilities: np.ndarray) -> None:
        """The next images' class probabilities [n,K]."""
        p = np.asarray(probabilities, np.float64)
        member = np.eye(len(self._sizes))[self._split[self._done:self._done + len(p)]]   # [n,splits]
        self._probabilities = self._probabilities + member.T @ p
        self._entropies += member.T @ _plogp(p)
        self._done += len(p)

    def result(self) -> dict[str, float]:
        """{"is", "is_std"}, once all images came."""
        assert self._done == len(self._split), f"{self._done} of {len(self._split)} images came"
        scores = np.exp(self._entropies / self._sizes - _plogp(self._probabilities / self._sizes[:, None]))
        return {"is": float(scores.mean()), "is_std": float(scores.std())}


def _plogp(p: np.ndarray) -> np.ndarray:
    """sum_k p_k log p_k, where 0 log 0 = 0."""
    return np.sum(p * np.log(np.where(p > 0, p, 1.0)), axis=-1)
