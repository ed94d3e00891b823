"""Products of a traced program: convolutions, matrices and attention, two operations for a multiply and an add; nothing is compiled."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def products(fn: Callable[..., Any], *args: Any, padding: bool = True) -> int:
    """Operations of all convolutions and matrix products of `fn(*args)`, two for each multiply and add.

    Args:
      fn, args: traced; the arguments may be ShapeDtypeStructs.
      padding: counts products with the zeros around an image, as published figures do; False leaves them out, as XLA's own count does.
    Returns: the count; loops count as often as they run, of branches the dearest.
    """
    return _count(jax.make_jaxpr(fn)(*args).jaxpr, padding)


def _count(jaxpr: Any, padding: bool) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(eqn.invars[0].aval.shape[i] for i in contract)
        elif name == "conv_general_dilated":
            total += _convolution(eqn, padding)
        else:
            inner = [_count(j, padding) for j in inner_jaxprs(eqn)]
            total += max(inner, default=0) if name == "cond" else sum(inner) * (eqn.params["length"] if name == "scan" else 1)
    return total


def inner_jaxprs(eqn: Any) -> list[Any]:
    """The programs inside an instruction of a jaxpr."""
    def is_jaxpr(value: Any) -> bool:
        return hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")

    values = jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr)
    return [getattr(value, "jaxpr", value) for value in values if is_jaxpr(value)]


def _convolution(eqn: Any, padding: bool) -> int:
    lhs, rhs, out = (v.aval.shape for v in (*eqn.invars, eqn.outvars[0]))
    p = eqn.params
    spec = p["dimension_numbers"]
    inputs = rhs[spec.rhs_spec[1]]  # channels of one group
    total = 2 * out[spec.out_spec[0]] * out[spec.out_spec[1]] * inputs
    for axis, (low, _) in enumerate(p["padding"]):
        size, kernel, positions = lhs[spec.lhs_spec[2 + axis]], rhs[spec.rhs_spec[2 + axis]], out[spec.out_spec[2 + axis]]
        stride, spread, reach = p["window_strides"][axis], p["lhs_dilation"][axis], p["rhs_dilation"][axis]
        at = [o * stride + k * reach - low for o in range(positions) for k in range(kernel)]
        # Zeros that a stride's gradient puts between pixels are nobody's work; those of the border only where they are asked for.
        total *= sum(i % spread == 0 and (padding or 0 <= i <= (size - 1) * spread) for i in at)
    return total


@dataclasses.dataclass(frozen=True)
class Passes:
    """Operations of `fn(params, x)` for one image; each pass is traced when it is first asked for.

    Attributes:
      fn: the network.
      params, x: shapes.
      padding: as of `products`.
    """

    fn: Callable[[Any, Any], Any]
    params_shapes: Any
    x: Any
    padding: bool = True

    @functools.cached_property
    def forward(self) -> int:
        """The value alone."""
        return products(self.fn, self.params_shapes, self.x, padding=self.padding)

    @functools.cached_property
    def image(self) -> int:
        """The value and its gradient in x."""
        return self._with_gradient(1)

    @functools.cached_property
    def params(self) -> int:
        """The value and its gradient in the parameters."""
        return self._with_gradient(0)

    @functools.cached_property
    def both(self) -> int:
        """The value and its gradient in both."""
        return self._with_gradient(0, 1)

    @property
    def backward(self) -> int:
        """The gradient in x alone, where another pass has run the network forward."""
        return self.image - self.forward

    def _with_gradient(self, *wrt: int) -> int:
        def pull(*given):
            out, back = jax.vjp(lambda *c: self.fn(*(c[wrt.index(i)] if i in wrt else given[i] for i in (0, 1))), *(given[i] for i in wrt))
            return out, back(jax.tree.map(jnp.ones_like, out))

        return products(pull, self.params_shapes, self.x, padding=self.padding)
