"""What a function computes twice is computed once, before it is differentiated.

A compiler merges equal instructions, but only after differentiation: where two losses read the same network at the same input, each has
its own backward pass through it by then, and two backward passes are no equal instructions. Merged before, they are one, of the sum.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np
from jax.extend import core

_LARGEST = 1 << 20  # bytes of a constant that is compared by value


def merged(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` with equal instructions merged: the same values and the same derivatives, with less work.

    Args:
      fn: of arrays and trees of them, free of side effects, called inside a traced function.
    """

    @functools.wraps(fn)
    def run(*args: Any) -> Any:
        traced, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
        out = core.jaxpr_as_fun(_merge(traced))(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), out)

    return run


def _merge(traced: core.ClosedJaxpr) -> core.ClosedJaxpr:
    jaxpr, same = traced.jaxpr, {}  # same: a variable whose instruction is dropped -> the one that it equals
    first: dict[Hashable, Any] = {}
    for var, value in zip(jaxpr.constvars, traced.consts, strict=True):
        known = first.setdefault(("constant", _constant(value)), var)
        if known is not var:
            same[var] = known
    eqns: list[Any] = []
    for eqn in jaxpr.eqns:
        invars = [v if isinstance(v, core.Literal) else same.get(v, v) for v in eqn.invars]
        key = (eqn.primitive, _frozen(eqn.params), tuple(_literal(v) if isinstance(v, core.Literal) else v for v in invars))
        place = len(eqns) if eqn.effects else first.setdefault(key, len(eqns))
        if place == len(eqns):
            eqns.append(eqn.replace(invars=invars))
            continue
        # The earlier one may have thrown away a result that this one needs.
        kept = [new if isinstance(old, core.DropVar) else old for old, new in zip(eqns[place].outvars, eqn.outvars, strict=True)]
        eqns[place] = eqns[place].replace(outvars=kept)
        same.update((new, old) for new, old in zip(eqn.outvars, kept, strict=True) if new is not old and not isinstance(new, core.DropVar))
    outvars = [v if isinstance(v, core.Literal) else same.get(v, v) for v in jaxpr.outvars]
    return core.ClosedJaxpr(jaxpr.replace(eqns=eqns, outvars=outvars), traced.consts)


def _constant(value: Any) -> Hashable:
    """Traced values by identity, numbers by value."""
    if isinstance(value, jax.core.Tracer) or getattr(value, "nbytes", _LARGEST + 1) > _LARGEST or not hasattr(value, "dtype"):
        return id(value)
    if jax.dtypes.issubdtype(value.dtype, jax.dtypes.extended):
        return id(value)  # keys
    array = np.asarray(value)
    return str(array.dtype), array.shape, array.tobytes(), getattr(value, "weak_type", False)


def _literal(v: Any) -> Hashable:
    return str(v.aval), np.asarray(v.val).tobytes()


def _frozen(value: Any) -> Hashable:
    """Equal for parameters of instructions that do the same; programs inside are compared instruction by instruction."""
    if isinstance(value, dict):
        return tuple((name, _frozen(value[name])) for name in sorted(value))
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(v) for v in value)
    if isinstance(value, core.ClosedJaxpr):
        return _program(value.jaxpr), tuple(map(_constant, value.consts))
    if isinstance(value, core.Jaxpr):
        return _program(value)
    if hasattr(value, "debug_info") and hasattr(value, "f"):
        # A derivative rule of a function, wrapped anew at every call. The function itself stands beside it as a program.
        return value.debug_info.func_src_info, value.debug_info.traced_for
    try:
        hash(value)
    except TypeError:
        return id(value)
    return None if getattr(value, "__name__", None) == "out_trees_" else value


def _program(jaxpr: core.Jaxpr) -> Hashable:
    numbers: dict[Any, int] = {}

    def number(v: Any) -> Hashable:
        return _literal(v) if isinstance(v, core.Literal) else (numbers.setdefault(v, len(numbers)), str(v.aval))

    heads = tuple(number(v) for v in (*jaxpr.constvars, *jaxpr.invars))
    body = tuple((eqn.primitive, _frozen(eqn.params), tuple(map(number, eqn.invars)), tuple(map(number, eqn.outvars))) for eqn in jaxpr.eqns)
    return heads, body, tuple(map(number, jaxpr.outvars))
