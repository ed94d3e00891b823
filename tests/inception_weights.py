"""Parameters and images for the Inception tests by a rule that needs numpy's integers alone, so that a golden can name it.

Number i of the tensor called `name` is uniform with mean 0 and variance 1: with seed s = crc32(name) and z the splitmix64 of
(s << 32) + i, it is sqrt(12) ((z >> 40) / 2^24 - 1/2) in float32. From these u:

    *.conv.weight, fc.weight   sqrt(2 / fan_in) u      *.bn.weight         1 + u / 8 (exactly 1 where a format does not hold it)
    *.bn.bias, fc.bias         u / 8                   *.bn.running_mean   u / 8
    *.bn.running_var           exp(u / 4)

fan_in is the product of all of the PyTorch shape but its first axis. Images: pixel (i, y, x, c) of "images H W" is
clip(128 + 56 u + 64 sin(0.9 i + 7 y / H + 5 x / W + c), 0, 255) truncated to uint8, the sine in float64.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np


def uniform(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 of mean 0 and variance 1."""
    z = np.arange(int(np.prod(shape)), dtype=np.uint64) + np.uint64(zlib.crc32(name.encode()) << 32)
    with np.errstate(over="ignore"):
        z += np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    unit = (z >> np.uint64(40)).astype(np.float32) / np.float32(2**24) - np.float32(0.5)
    return (np.float32(np.sqrt(12)) * unit).reshape(shape)


def state(shapes: Mapping[str, tuple[int, ...]], *, scales: bool = True) -> dict[str, np.ndarray]:
    """{PyTorch name: float32}; `scales=False` makes every *.bn.weight one."""
    out = {}
    for name, shape in shapes.items():
        u, kind = uniform(name, shape), ".".join(name.split(".")[-2:])
        if kind in ("conv.weight", "fc.weight"):
            out[name] = u * np.float32(np.sqrt(2 / np.prod(shape[1:])))
        elif kind == "bn.weight":
            out[name] = 1 + u / 8 if scales else np.ones_like(u)
        else:
            out[name] = np.exp(u / 4) if kind == "bn.running_var" else u / 8
    return out


def images(count: int, height: int, width: int, channels: int = 3) -> np.ndarray:
    """uint8 [count,height,width,channels]."""
    u = uniform(f"images {height} {width}", (count, height, width, channels)).astype(np.float64)
    i, y, x, c = np.ogrid[:count, :height, :width, :channels]
    return np.clip(128 + 56 * u + 64 * np.sin(0.9 * i + 7 * y / height + 5 * x / width + c), 0, 255).astype(np.uint8)
