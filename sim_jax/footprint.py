"""Memory of a training step by arithmetic, without compiling it.

States are exact: shapes and shardings say how many bytes of each array a device holds. The rest is an estimate of the moment when most is
alive, which is the backward pass of the dearer update:

    what backward passes find again    what JAX keeps under each network's policy, traced once, times the images of a micro-batch on a
                                       device. The generator's update holds the generator's, and with it the score
                                       networks' that gradients pass through; the critic's holds the fake score's. With an adversarial
                                       term, the encoder's that learns (for generated and real images) or hands on the gradient
    one block computed again           what its products read and write, for the largest block, where a policy is in force
    gradients                          of the network that moves, in float32, cut like its parameters
    the largest gathered layer         twice (the next one arrives meanwhile), where parameters are cut
    captions                           of the device's part of a whole batch, in bfloat16, for networks that take text

Compilers keep less than JAX asks for: norms and activations are computed again inside the fusions that read them. Policy "none" is therefore
counted as "convs" [measured: a DDPM++ of 128 channels in float32 on a TPU v5e, SIM: 1062 MiB compiled at level O0, 991 so, 3012 by JAX's own
account].
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from sim_jax import cost, flops, networks
from sim_jax.recipe import Recipe

_IMAGES = 1009
_RECOMPUTED = ("checkpoint", "remat", "remat2")


def tree_bytes(shapes: Any, shardings: Any) -> int:
    """Bytes that one device holds of a tree."""
    sizes = jax.tree.map(lambda a, s: math.prod(s.shard_shape(a.shape)) * a.dtype.itemsize, shapes, shardings)
    return sum(jax.tree.leaves(sizes))


def states(shapes: Any, shardings: Any, teacher: Any = None, teacher_shardings: Any = None) -> dict[str, int]:
    """{"parameters", "optimiser", "average", "teacher", "other": bytes per device} of a DistillState and the teacher's parameters."""
    out = dict.fromkeys(("parameters", "optimiser", "average", "teacher", "other"), 0)
    for role in ("generator", "fake_score", "discriminator"):
        network, where = getattr(shapes, role), getattr(shardings, role)
        if network is not None:
            for name, field in (("parameters", "params"), ("optimiser", "opt_state"), ("average", "ema")):
                out[name] += tree_bytes(getattr(network, field), getattr(where, field))
    if teacher is not None:
        out["teacher"] = tree_bytes(teacher, teacher_shardings)
    out["other"] = tree_bytes(shapes, shardings) - sum(out[k] for k in ("parameters", "optimiser", "average"))
    return out


@functools.cache
def _per_image(spec: tuple[tuple[str, Any], ...], dtype: str, remat: str, of_params: bool, maps: tuple[int, ...] | None) -> tuple[int, int]:
    """Bytes for one image between the forward and the backward pass: what JAX keeps, and what the dearest block computes again.

    Traced for a number of images that is no network's width, so that arrays of every sample are told from parameters.
    """
    network, wrt = networks.build(dict(spec), dtype=dtype, remat=remat), 0 if of_params else 1
    x, sigma, cond = cost.sample(network, _IMAGES)

    def residuals(params, x, sigma, cond):
        fixed = [params, x]
        run = network.denoise if maps is None else functools.partial(network.features, resolutions=maps)
        return jax.vjp(lambda v: run(*fixed[:wrt], v, *fixed[wrt + 1:], sigma, cond), fixed[wrt])[1]

    jaxpr = jax.make_jaxpr(residuals)(network.shapes(), x, sigma, cond)
    arrays = {id(v): v.aval for v in jaxpr.jaxpr.outvars}.values()  # what two instructions find again is kept once
    size = sum(_size(a) for a in arrays if any(n % _IMAGES == 0 for n in a.shape)) // _IMAGES
    blocks = [flops.inner_jaxprs(eqn)[0] for eqn in jaxpr.jaxpr.eqns if eqn.primitive.name in _RECOMPUTED]
    return size, max((_products(block) for block in blocks), default=0) // _IMAGES


def _size(array: Any) -> int:
    return math.prod(array.shape) * array.dtype.itemsize


def per_image(network: Any, *, of_params: bool, maps: tuple[int, ...] | None = None) -> tuple[int, int]:
    """`_per_image` of a network: (kept, computed again) bytes for one image, for the gradient in its parameters or in its image; with `maps`
    those of the encoder alone, up to the feature maps of these resolutions."""
    policy = getattr(network.module, "remat", "none").replace("none", "convs")  # module docstring
    return _per_image(tuple(sorted(network.spec.items())), str(network.dtype), policy, of_params, maps)


def _products(jaxpr: Any) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            values = [eqn.invars[0], eqn.outvars[0]]
            values += ([eqn.invars[1]] if eqn.primitive.name == "dot_general" and eqn.invars[1].aval.ndim > 2 else [])
            total += sum(_size(v.aval) for v in values if any(n and n % _IMAGES == 0 for n in v.aval.shape))
        total += sum(_products(inner) for inner in flops.inner_jaxprs(eqn))
    return total


def images_per_piece(recipe: Recipe) -> int:
    """Images of a micro-batch on one device."""
    return recipe.batch_size // (recipe.layout.mesh.size * recipe.micro_batches)


def temporaries(recipe: Recipe, shapes: Any) -> dict[str, int]:
    """{"activations", "gradients", "gathered", and "captions" with text: bytes per device} of the dearer update; `shapes` are the
    DistillState's."""
    out = []
    for turn in _differentiated(recipe):
        kept, again = zip(*(per_image(_network(recipe, role), of_params=of_params, maps=maps) for role, of_params, maps in turn), strict=True)
        out.append({"activations": images_per_piece(recipe) * (sum(kept) + max(again)), "gradients": _gradients(recipe, shapes, turn[0][0]),
                    "gathered": 2 * max((_gathered(recipe, shapes, role) for role, *_ in turn if role != "teacher"), default=0)})
    text = cost.text_shape(recipe.fake_score.network)
    captions = {"captions": recipe.batch_size // recipe.layout.mesh.size * text[0] * (2 * text[1] + 1)} if text else {}
    return max(out, key=lambda parts: sum(parts.values())) | captions


def _differentiated(recipe: Recipe) -> list[list[tuple[str, bool, tuple[int, ...] | None]]]:
    """What each update differentiates, the network that moves first: (role, in its parameters or in the image, maps of an encoder or None)."""
    critic, gan = [("fake_score", True, None)], recipe.adversary
    if recipe.generator is None:
        return [critic]
    called = cost.calls(recipe)
    scores = [(role, False, None) for role, name in (("teacher", "teacher"), ("fake_score", "fake")) if called[name][1]]
    generator = [("generator", True, None), *scores]
    if gan is not None:
        maps = gan.role.network.resolutions
        critic += [("fake_score", True, maps)] * 2 * (gan.features == "fake_score")
        generator += [(gan.features, False, maps)] * bool(gan.weight or called["discriminate"][1])
    return [critic, generator]


def _network(recipe: Recipe, role: str) -> Any:
    return recipe.teacher if role == "teacher" else getattr(recipe, role).network


def _gradients(recipe: Recipe, shapes: Any, role: str) -> int:
    params = getattr(shapes, role).params
    where = getattr(recipe, role).shardings
    whole = sum(_size(a) for a in jax.tree.leaves(params))
    return whole if where is None else tree_bytes(params, where)


def _gathered(recipe: Recipe, shapes: Any, role: str) -> int:
    """The largest array of a network that has to be gathered, in the type that the network computes in."""
    where, width = getattr(recipe, role).shardings, jnp.dtype(getattr(_network(recipe, role), "dtype", "float32")).itemsize
    sizes = jax.tree.map(lambda a, s: 0 if s.is_fully_replicated else math.prod(a.shape) * width, getattr(shapes, role).params, where)
    return max(jax.tree.leaves(sizes), default=0)
