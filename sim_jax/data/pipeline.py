"""Batches in an order that is a function of (seed, global index) only.

The stream is endless. Sample g = 0, 1, 2, ... is image P_e[g mod N] of epoch e = g div N, where P_e is a
permutation of the N images derived from (seed, e): each epoch visits each image once, and batches run on
across epochs. Step t holds the samples g = t B, ..., t B + B - 1, and process p of P holds those of its rows
that lie on its devices: p b, ..., p b + b - 1, with b = B / P, where the mesh follows the process index, and
others (`rows`) where it follows the wires of a TPU pod. So the position in the stream is the step alone, any
step can be resumed, and the number of processes and threads changes nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np

from sim_jax.data.captions import Captions
from sim_jax.data.source import Source, gather

_ENDLESS = 1 << 62


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    # Raw Philox output: numpy promises that it never changes, unlike what Generator.permutation makes of it.
    ranks = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(size)
    return np.argsort(ranks, kind="stable")


def image_order(index: np.ndarray, *, size: int, seed: int, shuffle: bool = True) -> np.ndarray:
    """Which image each global sample index means.

    Args:
      index: int64 [n], global sample indices (from 0, over all epochs).
      size: N, the number of images.
      seed: 0 to 2^64 - 1.
      shuffle: False for the order of the source in every epoch.

    Returns:
      int64 [n] in [0, N).
    """
    epochs, positions = np.divmod(index, size)
    if not shuffle:
        return positions
    images = np.empty_like(positions)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        images[here] = _permutation(seed, int(epoch), size)[positions[here]]
    return images


def to_float(images: np.ndarray) -> np.ndarray:
    """uint8 images to float32 in [-1, 1]: x / 127.5 - 1."""
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1)


@dataclasses.dataclass(frozen=True)
class Batches:
    """`batches[t]` is this process's part of step t's batch, a pure function of t; see `make_batches`."""

    source: Source | None
    seed: int
    batch_size: int
    process_index: int = 0
    process_count: int = 1
    shuffle: bool = True
    rows: np.ndarray | None = None
    captions: Captions | None = None

    def __post_init__(self):
        if self._size == 0:
            raise ValueError("data: got a source without images, allowed: at least one image")
        if self.source is not None and self.captions is not None and len(self.captions) != len(self.source):
            raise ValueError(f"text.path: got {len(self.captions)} captions, allowed: {len(self.source)}, one for each image")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed: got {self.seed}, allowed: 0 to 2^64 - 1")
        if self.process_count < 1 or not 0 <= self.process_index < self.process_count:
            raise ValueError(f"process_index: got {self.process_index} of {self.process_count}, "
                             f"allowed: 0 to process_count - 1")
        if self.batch_size < 1 or self.batch_size % self.process_count:
            raise ValueError(f"batch_size: got {self.batch_size}, "
                             f"allowed: a positive multiple of the number of processes, {self.process_count}")

    def __len__(self) -> int:
        return _ENDLESS

    @property
    def local_rows(self) -> np.ndarray:
        """int64 [b], within the global batch."""
        local = self.batch_size // self.process_count
        return np.arange(local, dtype=np.int64) + self.process_index * local if self.rows is None else np.asarray(self.rows, np.int64)

    @property
    def _size(self) -> int:
        return len(self.captions if self.source is None else self.source)

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        index = step * self.batch_size + self.local_rows
        chosen = image_order(index, size=self._size, seed=self.seed, shuffle=self.shuffle)
        batch = {"index": index}
        if self.source is not None:
            images, labels = gather(self.source, chosen)
            batch = {"image": to_float(images), "label": labels, **batch}
        if self.captions is not None:
            batch["text"], batch["text_mask"] = self.captions.text(chosen)
        return batch


def make_batches(source: Source | None, *, seed: int, batch_size: int, start_step: int = 0, process_index: int = 0,
                 process_count: int = 1, num_threads: int = 2, shuffle: bool = True, rows: np.ndarray | None = None,
                 captions: Captions | None = None) -> Iterator[dict]:
    """An endless iterator over this process's batches, read ahead by threads.

    Args:
      source: any source of this package; one in memory (digits, a cached zip) is gathered by fancy indexing. None: captions alone.
      seed: of the order.
      batch_size: B, over all processes.
      start_step: the first step to yield.
      process_index, process_count: p and P.
      num_threads: how many batches are prepared at a time; 0 prepares each when it is asked for.
      shuffle: a new permutation every epoch, else the source's own order.
      rows: int [b], the rows of the global batch that this process holds; None for p b ... p b + b - 1.
      captions: of the images, or where there is no source what the order is over.

    Returns:
      an iterator of {"image": float32 [b,H,W,C] in [-1, 1], "label": int32 [b], "index": int64 [b]}, where
      index is the global sample index g and the rows are those of the global batch that `rows` says, in that order, and with captions
      "text" [b,L,D] and "text_mask" bool [b,L];
      the iterator has `close()`.

    Raises:
      ValueError: a bad argument, at once; an unreadable image, from `next`.
    """
    import grain  # here, as data-free runs should not wait for it

    if start_step < 0:
        raise ValueError(f"start_step: got {start_step}, allowed: 0 and above")
    if num_threads < 0:
        raise ValueError(f"num_threads: got {num_threads}, allowed: 0 and above")
    batches = Batches(source, seed, batch_size, process_index, process_count, shuffle, rows, captions)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
    iterator = iter(grain.MapDataset.source(batches).to_iter_dataset(options))
    iterator.set_state({"next_index": start_step})
    return iterator
