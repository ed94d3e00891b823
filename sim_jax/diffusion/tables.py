"""What this package's literal tables share: a checked look-up, and the choice between numpy and jax.numpy."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def choose(table: Mapping[str, Callable], key: str, name: str, knobs: Mapping[str, Any]) -> Callable:
    """`table[name]` with `knobs` bound, which must be among its keyword-only arguments.

    Raises:
      ValueError: an unknown name or knob; the message has the key, what came and what is allowed.
    """
    if name not in table:
        raise ValueError(f"{key}: got {name!r}, allowed: {', '.join(table)}")
    parameters = inspect.signature(table[name]).parameters.values()
    allowed = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    for knob in knobs:
        if knob not in allowed:
            raise ValueError(f"{key} {name!r}: got knob {knob!r}, allowed: {', '.join(allowed)}")
    return functools.partial(table[name], **knobs)


def namespace(x) -> ModuleType:
    """jax.numpy for a jax array (traced or not); numpy for host numbers, which so stay float64."""
    return jnp if isinstance(x, jax.Array) else np
