"""Mesh, and regex rules that say how each array lies on it: the only file that knows about devices.

A rule is (regex, strategy); the first regex found in an array's path (`generator/params/enc/32x32_conv/weight`) decides:

    replicate      a copy on every device
    fsdp           cut along the largest axis that divides evenly, over the mesh's last axis; small arrays are copied
    fsdp:NAME      the same over mesh axis NAME

The batch is cut over all mesh axes. Under FSDP a layer's parameters are gathered right before it computes, in the type that it computes
in, and their gradients are summed over the devices and cut like the parameters (`gather_at_use`). Without these constraints the compiler
splits convolutions by channel; with the whole tree gathered at once (`Layout.gather`) it keeps all of it until the backward pass ends.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sim_jax.types import Array, Params

_SMALLEST = 1024  # arrays with fewer numbers are not worth a collective
_TILE = 8         # rows of a TPU's register: parts of other sizes are padded, and then shifted between devices


def make_mesh(axes: str = "data:-1", *, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh from "name:size,name:size"; one size may be -1 and takes what is left.

    Raises: ValueError if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    try:
        names, sizes = zip(*(part.split(":") for part in axes.split(",")), strict=True)
        names, sizes = tuple(name.strip() for name in names), tuple(int(size) for size in sizes)
        if not all(name.isidentifier() for name in names):
            raise ValueError
    except ValueError:
        raise ValueError(f"sharding.mesh: got {axes!r}, allowed: name:size pairs such as 'data:-1' or 'data:2,fsdp:4'") from None
    known = math.prod(s for s in sizes if s > 0)
    if any(s == 0 or s < -1 for s in sizes) or sizes.count(-1) > 1 or len(set(names)) < len(names) or len(devices) % known:
        raise ValueError(f"sharding.mesh: got {axes!r}, allowed: sizes that multiply to the {len(devices)} devices, one may be -1")
    sizes = tuple(len(devices) // known if s == -1 else s for s in sizes)
    if math.prod(sizes) != len(devices):
        raise ValueError(f"sharding.mesh: got {axes!r} for {len(devices)} devices, allowed: sizes that multiply to {len(devices)}")
    # Explicit axes, the default of make_mesh, refuse gradients of convolutions.
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(names), devices=devices)


def _fsdp_spec(shape: tuple[int, ...], size: int, axis: str) -> P:
    fitting = [(n, i) for i, n in enumerate(shape) if n % size == 0]
    if math.prod(shape) < _SMALLEST or not fitting:
        return P()
    largest = max((n % (size * _TILE) == 0, n, i) for n, i in fitting)[2]
    return P(*(axis if i == largest else None for i in range(len(shape))))


def check_rules(rules: Sequence[tuple[str, str]], mesh: Mesh) -> None:
    """Raises ValueError for a rule that is no (regex, strategy), or names a mesh axis that does not exist."""
    allowed = ("replicate", "fsdp", *(f"fsdp:{name}" for name in mesh.axis_names))
    for rule in rules:
        try:
            pattern, strategy = rule
            re.compile(pattern)
        except (ValueError, TypeError, re.error):
            raise ValueError(f"sharding.rules: got {rule!r}, allowed: (regex, strategy)") from None
        if strategy not in allowed:
            raise ValueError(f"sharding.rules: got strategy {strategy!r}, allowed: {', '.join(allowed)}")


def tree_shardings(tree: Any, mesh: Mesh, rules: Sequence[tuple[str, str]]) -> Any:
    """A NamedSharding for every leaf of a tree of shapes.

    Raises: ValueError naming the array that no rule matches.
    """

    def one(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not leaf.shape:
            return NamedSharding(mesh, P())
        for pattern, strategy in rules:
            if re.search(pattern, name):
                kind, _, axis = strategy.partition(":")
                if kind == "replicate":
                    return NamedSharding(mesh, P())
                axis = axis or mesh.axis_names[-1]
                return NamedSharding(mesh, _fsdp_spec(leaf.shape, mesh.shape[axis], axis))
        raise ValueError(f"sharding.rules: no rule matches {name} {tuple(leaf.shape)}; end the rules with ('.*', 'replicate')")

    return jax.tree_util.tree_map_with_path(one, tree)


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a step needs to know of the mesh; `None` (tests, one device) constrains nothing.

    Attributes:
      mesh: the devices.
      late: the networks gather their own parameters, layer by layer (`gather_at_use`), so `gather` leaves them cut.
    """

    mesh: Mesh | None = None
    late: bool = False

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, P())

    @property
    def batch(self) -> NamedSharding:
        return NamedSharding(self.mesh, P(self.mesh.axis_names))

    def split(self, tree: Any) -> Any:
        """Cuts per-sample arrays [B, ...] over the mesh. Noise that is not cut is drawn, and used, on every device."""
        return tree if self.mesh is None else jax.lax.with_sharding_constraint(tree, self.batch)

    def gather(self, params: Params) -> Params:
        """Whole parameters, unless the networks see to that themselves."""
        return params if self.mesh is None or self.late else jax.lax.with_sharding_constraint(params, self.replicated)

    def scatter(self, grads: Params, shardings: Params | None) -> Params:
        """Gradients cut like the parameters they belong to."""
        return grads if self.mesh is None or shardings is None else jax.lax.with_sharding_constraint(grads, shardings)


def gather_at_use(shardings: Params) -> Callable[[tuple[str, ...], Array, Any, Array | None], Array] | None:
    """What makes a network's parameters whole, one by one: (path, array, dtype, after) -> the array in `dtype`, on every device.

    It is gathered once `after` is there, and its gradient is summed over the devices and cut as `shardings` say. None where no parameter is
    cut.
    """
    cut = {tuple(key.key for key in path): where for path, where in jax.tree_util.tree_leaves_with_path(shardings)
           if not where.is_fully_replicated}

    def gather(path: tuple[str, ...], array: Array, dtype: Any, after: Array | None = None) -> Array:
        if path not in cut:
            return array.astype(dtype)
        if after is not None:
            array, _ = jax.lax.optimization_barrier((array, jax.lax.stop_gradient(after)))
        return _whole(cut[path], jax.numpy.dtype(dtype), array)

    return gather if cut else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _whole(where: NamedSharding, dtype: Any, array: Array) -> Array:
    # The cast comes first, so that half as much is sent in bfloat16.
    part = jax.lax.with_sharding_constraint(array.astype(dtype), where)
    return jax.lax.with_sharding_constraint(part, NamedSharding(where.mesh, P()))


def _whole_forward(where: NamedSharding, dtype: Any, array: Array) -> tuple[Array, None]:
    return _whole(where, dtype, array), None


def _whole_backward(where: NamedSharding, dtype: Any, _: None, gradient: Array) -> tuple[Array]:
    # Whole first: asked for the part alone, the partitioner splits the convolution that makes it and sends activations around.
    gradient = jax.lax.with_sharding_constraint(gradient, NamedSharding(where.mesh, P()))
    return (jax.lax.with_sharding_constraint(gradient, where).astype(jax.numpy.float32),)


_whole.defvjp(_whole_forward, _whole_backward)


def place(tree: Any, shardings: Any) -> Any:
    """Host arrays onto devices, each process giving only the parts that its devices hold; always fresh buffers."""

    def one(array, sharding):
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: np.array(array[index]))

    return jax.tree.map(one, tree, shardings)


def local_rows(sharding: NamedSharding, count: int) -> np.ndarray:
    """Which of `count` rows, cut by `sharding`, lie on this process's devices; int64, ascending.

    On TPU pods the mesh follows the wires, so they need not be one range.
    """
    parts = {part[0].indices(count)[:2] for part in sharding.addressable_devices_indices_map((count,)).values()}
    return np.concatenate([np.arange(*part) for part in sorted(parts)])


def from_rows(rows: np.ndarray, local: np.ndarray, sharding: NamedSharding, count: int) -> Array:
    """The global array [count, ...] cut by `sharding`, of which every process gives its `local_rows`, [len(rows), ...]."""

    def part(index):
        start, stop, _ = index[0].indices(count)
        return local[np.searchsorted(rows, start):][: stop - start]

    return jax.make_array_from_callback((count, *local.shape[1:]), sharding, part)


def to_host(tree: Any) -> Any:
    """Device arrays, sharded or not, as whole numpy arrays on every process."""

    def one(array):
        if isinstance(array, Array) and not array.is_fully_addressable:
            from jax.experimental import multihost_utils  # only where there are several processes

            return np.asarray(multihost_utils.process_allgather(array, tiled=True))
        return np.asarray(array)

    return jax.tree.map(one, tree)
