"""The generator's samples during training: differentiable through the last call, for generators of one and of a few calls.

A generator of K calls is trained on what it meets at inference (DMD2, arXiv 2405.14867, section 4.5, "backward simulation"):

    sample i stops at call k = i mod K;  x_1 = sigma_1 z;  x_{j+1} = sg[D(x_j; sigma_j)] + sigma_{j+1} n_j;  x0 = D(x_k; sigma_k)

Every batch holds every k equally often, so a batch costs (K - 1) / 2 extra forward passes and nothing depends on a drawn k; DMD2's
code draws one k for a whole iteration instead [repo]. `inputs="data"` is the alternative that DMD2 argues against and FastGen uses:
x_k = real image + sigma_k n for k > 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from sim_jax.diffusion.samplers import FewStep
from sim_jax.networks import Network
from sim_jax.types import Array, Cond, DenoiseFn, Key, Params

INPUTS = ("simulated", "data")


def generate(network: Network, params: Params, z: Array, renoise: Sequence[Array], cond: Cond, *, plan: FewStep,
             images: Array | None = None, dropout_keys: Key | None = None) -> Array:
    """x0 [B,H,W,C], sample i after call i mod K of K.

    Args:
      network, params: the generator.
      z: [B,H,W,C] unit noise, B a multiple of K.
      renoise: K - 1 arrays like z.
      cond: entries [B, ...], of every call.
      plan: the K noise levels.
      images: real images [B,H,W,C] to start from after the first call's input; None simulates.
      dropout_keys: [B], of the last call; the calls before it evaluate, as at inference.
    """
    simulate = network.bind(jax.lax.stop_gradient(params))
    x, sigma = (_simulated(simulate, z, renoise, cond, plan) if images is None else _noised(images, z, plan))
    return network.bind(params, dropout_keys=dropout_keys)(x, sigma, cond)


def is_first(index: Array, plan: FewStep) -> Array:
    """Which samples `index` [B] stop at the first call, whose input is noise alone."""
    return index % len(plan.sigmas) == 0


def _levels(z: Array, plan: FewStep) -> tuple[Array, Array]:
    """Noise levels of the inputs and those that the network is told, each [B]."""
    steps = len(plan.sigmas)
    told = [plan.told(k) for k in range(steps)]
    return tuple(jnp.tile(jnp.asarray(values, z.dtype), z.shape[0] // steps) for values in (plan.sigmas, told))


def _simulated(denoise: DenoiseFn, z: Array, renoise: Sequence[Array], cond: Cond, plan: FewStep) -> tuple[Array, Array]:
    """Inputs x_k [B,H,W,C] of the last calls, and the levels that they are told [B]."""
    steps, (_, told) = len(plan.sigmas), _levels(z, plan)
    groups = z.shape[0] // steps

    def rows(tree):
        return jax.tree.map(lambda a: a.reshape(groups, steps, *a.shape[1:]), tree)

    x, reached = rows(plan.sigmas[0] * z), []
    for k in range(1, steps):
        # Samples that stop here leave; the rest take call k. Every device holds whole groups, so nothing moves between devices.
        reached.append(x[:, 0])
        going, condition = (jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), tree)
                            for tree in (x[:, 1:], jax.tree.map(lambda a: a[:, k:], rows(cond))))
        x0 = denoise(going, jnp.full(going.shape[:1], plan.told(k - 1), z.dtype), condition)
        x = x0.reshape(groups, steps - k, *z.shape[1:]) + plan.sigmas[k] * rows(renoise[k - 1])[:, k:]
    reached.append(x[:, 0])
    return jax.lax.stop_gradient(jnp.stack(reached, axis=1).reshape(z.shape)), told


def _noised(images: Array, z: Array, plan: FewStep) -> tuple[Array, Array]:
    sigma, told = _levels(z, plan)
    x = sigma[:, None, None, None] * z
    first = is_first(jnp.arange(z.shape[0]), plan)[:, None, None, None]
    return jnp.where(first, x, images + x), told
