"""Parameters and inputs by the rule of `inception_weights.uniform`, for goldens that then hold results alone.

From the u of a tensor's name, in PyTorch's layout:

    *.weight of two or more axes   u / sqrt(fan_in)        *.weight of one axis   1 + u / 8        *.bias   u / 8
    *scale_shift_table, *y_embedding, *embedding_table.weight   u / 4

where fan_in is the product of all axes but the first. Layers that diffusers' DiT repeats in every block are block 0's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from inception_weights import uniform

__all__ = ["once", "state", "uniform"]


def once(name: str) -> str:
    """The name of block 0's copy."""
    return re.sub(r"transformer_blocks\.\d+\.norm1\.emb\.", "transformer_blocks.0.norm1.emb.", name)


def state(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """{name: float32}."""
    out = {}
    for name, shape in shapes.items():
        u = uniform(once(name), shape)
        if name.endswith(("scale_shift_table", "y_embedding", "embedding_table.weight")):
            out[name] = u / 4
        elif name.endswith(".bias"):
            out[name] = u / 8
        else:
            out[name] = 1 + u / 8 if len(shape) == 1 else u * np.float32(np.prod(shape[1:]) ** -0.5)
    return out
