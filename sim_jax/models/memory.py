"""What a network keeps in memory: which results its backward pass finds again, and where its parameters come from.

A policy says what of each block is kept for the backward pass; everything else is computed a second time (`jax.checkpoint`,
Chen et al. 2016, arXiv 1604.06174):

    none      everything is kept
    convs     results of convolutions and matrix products; norms, activations and the products inside attention are recomputed
    blocks    the block's input alone: a second forward pass, for the least memory

Where parameters are cut over devices a layer asks for its own right before it uses them (`gathering`), and under every policy the
backward pass asks again instead of keeping them. A block's parameters are tied to the input of the block before it: without that a compiler
gathers whole networks at once, since nothing else says when; with it they arrive while that block computes, and two blocks' are whole.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from sim_jax.types import Array

POLICIES = ("none", "convs", "blocks")
# (path in the parameter tree, the part that this device holds, type to compute in, an array to wait for or None) -> the whole array
Gather = Callable[[tuple[str, ...], Array, Any, Array | None], Array]
_GATHER: contextvars.ContextVar[Gather | None] = contextvars.ContextVar("gather", default=None)
_AFTER: contextvars.ContextVar[Array | None] = contextvars.ContextVar("after", default=None)  # what a block's parameters wait for
_INPUT: contextvars.ContextVar[Array | None] = contextvars.ContextVar("input", default=None)  # of the latest block


@contextlib.contextmanager
def gathering(gather: Gather | None) -> Iterator[None]:
    """Layers applied inside get their parameters through `gather`."""
    tokens = [(variable, variable.set(value)) for variable, value in ((_GATHER, gather), (_AFTER, None), (_INPUT, None))]
    try:
        yield
    finally:
        for variable, token in tokens:
            variable.reset(token)


def parameter(module: nn.Module, name: str, init: Callable[..., Array], shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """`module`'s parameter, kept in float32, as an array of `dtype` that is whole on every device."""
    value, gather = module.param(name, init, shape), _GATHER.get()
    if gather is None or module.is_initializing():
        return value.astype(dtype)
    return gather((*module.path, name), value, dtype, _AFTER.get())


def _keep_all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name != "sharding_constraint"


def _keep_products(primitive: Any, *_: Any, **params: Any) -> bool:
    if primitive.name == "dot_general":
        (_, _), (batch, _) = params["dimension_numbers"]
        return not batch  # attention's logits, the only products with batch axes, are the largest arrays of a block
    return primitive.name == "conv_general_dilated"


_KEEP: dict[str, Callable[..., bool] | None] = {"none": _keep_all_but_gathered, "convs": _keep_products, "blocks": None}


def block(cls: type[nn.Module], policy: str) -> type[nn.Module]:
    """The module class `cls`, which keeps what `policy` says."""
    if _GATHER.get() is not None:
        return _late(cls, policy)
    return cls if policy == "none" else nn.remat(cls, policy=_KEEP[policy])


@functools.cache
def _late(cls: type[nn.Module], policy: str) -> type[nn.Module]:
    """`cls`, whose parameters wait for the input of the block before it."""

    class Late(nn.remat(cls, policy=_KEEP[policy])):
        def __call__(self, x: Array, *args: Any) -> Array:
            token = _AFTER.set(_INPUT.get())
            try:
                out = super().__call__(x, *args)
            finally:
                _AFTER.reset(token)
            _INPUT.set(x)
            return out

    return Late
