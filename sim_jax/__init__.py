"""Distil pretrained diffusion models into one- and few-step generators, in JAX.

    generator = sim_jax.load_generator(workdir_or_file)
    images = generator.sample(16, seed=0)
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
_ATTRIBUTES = {"load_generator": "sim_jax.load"}
_MODULES = ("convert", "data", "diffusion", "evals", "networks", "objectives")


def __getattr__(name: str) -> Any:
    """Submodules and `load_generator` on first use, so that importing the package costs nothing."""
    if name in _ATTRIBUTES:
        return getattr(importlib.import_module(_ATTRIBUTES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"sim_jax.{name}")
    raise AttributeError(f"module 'sim_jax' has no attribute {name!r}")
