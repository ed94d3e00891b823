"""Parameter trees as flat tables under PyTorch names, and the layouts in which the two frameworks keep them.

A tree's path joined by dots *is* the PyTorch name. Only layouts differ: convolutions OIHW there and HWIO here, linear layers
[out, in] there and [in, out] here; everything one-dimensional is the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np

from sim_jax.types import Params


def flatten(tree: Params, prefix: str = "") -> dict[str, object]:
    """{"enc.16x16_conv.weight": leaf, ...}, sorted by name."""
    out = {}
    for key in sorted(tree):
        name = f"{prefix}{key}"
        out.update(flatten(tree[key], name + ".") if isinstance(tree[key], Mapping) else {name: tree[key]})
    return out


def unflatten(table: Mapping[str, object]) -> Params:
    """The inverse of `flatten`."""
    tree: dict = {}
    for name, leaf in table.items():
        *scopes, last = name.split(".")
        node = tree
        for scope in scopes:
            node = node.setdefault(scope, {})
        node[last] = leaf
    return tree


_TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0)}
_FROM_TORCH = {4: (2, 3, 1, 0), 2: (1, 0)}


def torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that PyTorch gives to an array of this shape here."""
    return tuple(shape[axis] for axis in _TO_TORCH.get(len(shape), range(len(shape))))


def to_torch_layout(array: np.ndarray) -> np.ndarray:
    """A view in PyTorch's order of axes."""
    return array.transpose(_TO_TORCH.get(array.ndim, tuple(range(array.ndim))))


def from_torch_layout(array: np.ndarray) -> np.ndarray:
    """A view in the order of axes here."""
    return array.transpose(_FROM_TORCH.get(array.ndim, tuple(range(array.ndim))))


def to_torch(params: Params, *, prefix: str = "model.") -> dict[str, np.ndarray]:
    """A network's parameters as EDM's PyTorch state, {name: array}; `prefix` is the preconditioner's attribute."""
    return {prefix + name: to_torch_layout(np.asarray(leaf)) for name, leaf in flatten(params).items()}


def from_torch(state: Mapping[str, np.ndarray], shapes: Params, *, prefix: str = "model.", source: str = "state") -> Params:
    """Fills the tree `shapes` from a PyTorch state; every name must be used and every shape must fit.

    Args:
      state: {PyTorch name: array}, any float type.
      shapes: tree of ShapeDtypeStructs, as from `Network.shapes`.
      prefix: what the state's names carry in front of the tree's.
      source: named in the error.
    Returns: tree of float32 numpy arrays, views of the state's where those are float32.
    Raises: ValueError listing names that are missing, unused or of another shape.
    """
    check(state, shapes, prefix=prefix, source=source)
    return unflatten({name: from_torch_layout(np.asarray(state[prefix + name])).astype(np.float32, copy=False)
                      for name in flatten(shapes)})


def check(state: Mapping[str, np.ndarray], shapes: Params, *, prefix: str = "model.", source: str = "state") -> None:
    """As `from_torch`, without the result: raises ValueError listing what does not fit."""
    wanted = {prefix + name: torch_shape(leaf.shape) for name, leaf in flatten(shapes).items()}
    problems = _list("missing", wanted.keys() - state.keys()) + _list("unused", state.keys() - wanted.keys())
    wrong = sorted(name for name in wanted.keys() & state.keys() if np.shape(state[name]) != wanted[name])
    problems += [f"{name} has shape {np.shape(state[name])}, expected {wanted[name]}" for name in wrong[:8]]
    problems += [f"{len(wrong) - 8} more of another shape"] if len(wrong) > 8 else []
    if problems:
        raise ValueError(f"{source}: does not fit the network: {'; '.join(problems)}")


def _list(what: str, names) -> list[str]:
    names = sorted(names)
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return [f"{what}: {', '.join(names[:8])}{more}"] if names else []


def describe(tree: Params) -> list[tuple[str, tuple[int, ...], str]]:
    """(name, shape, dtype) per leaf, for tables and messages."""
    return [(name, tuple(leaf.shape), str(leaf.dtype)) for name, leaf in flatten(tree).items()]


def count(tree: Params) -> int:
    """Numbers in a tree."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
