"""What the compiler is told."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

# Of XLA's two sets of CPU kernels the older one is faster for convolutions of larger images, their gradients in the weights above all, and
# the newer one (YNNPACK) for all else: a step of CIFAR-10's network takes 10.8 s so and 13.2 s with XLA's own choice, the newer one for
# everything. That is better for 8x8 images, 138 ms to 146, and transformers, 62 ms to 72 (measured on one core of an AMD EPYC, jaxlib 0.10.2).
_CPU = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
_LARGER = 16  # pixels across


def use_precision(precision: str) -> None:
    """Of float32 products: "highest", "high" (tf32 on GPUs) or "default". A CPU's are float32 under every name, but XLA's fastest kernels for
    it serve the default alone: with "highest" a step of 8x8 images takes 155 ms instead of 125 (measured as above)."""
    jax.config.update("jax_default_matmul_precision", None if jax.default_backend() == "cpu" else precision)


def options(mesh: Mesh | None, network: Mapping[str, Any]) -> dict[str, str] | None:
    """`compiler_options` of `jax.jit` for training a network of this description on this mesh; None: the compiler's own."""
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    convolves = "model_channels" in network and network["img_resolution"] >= _LARGER
    return _CPU if platform == "cpu" and convolves and _knows_cpu_options() else None


@functools.cache
def _knows_cpu_options() -> bool:
    """Experimental options come and go, and one that the compiler does not know is an error to it."""
    try:
        jax.jit(lambda x: x + 1, compiler_options=_CPU).lower(jax.ShapeDtypeStruct((), "float32")).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
