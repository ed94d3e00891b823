"""Keys by purpose and by sample, for everything that draws: training, probes, sampling.

key -> fold in the purpose's name -> fold in the sample's index. Two samples, or two purposes, never share a key, and a sample's
draws depend on neither the batch it sits in nor the device it lands on.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import jax

from sim_jax.types import Array, Key


def purpose_id(purpose: str) -> int:
    """A fixed 32-bit number for a name."""
    return zlib.crc32(purpose.encode())


def sample_keys(key: Key, purpose: str, index: Array) -> Key:
    """Keys [B] for samples `index` [B] and one purpose."""
    base = jax.random.fold_in(key, purpose_id(purpose))
    return jax.vmap(lambda i: jax.random.fold_in(base, i))(index)


def normal(keys: Key, shape: Sequence[int]) -> Array:
    """Unit noise [B, *shape], sample i from keys[i] alone."""
    return jax.vmap(lambda key: jax.random.normal(key, tuple(shape)))(keys)
