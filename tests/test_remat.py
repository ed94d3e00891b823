"""What networks keep for the backward pass: the same gradients under every policy, and less memory by the compiler's own analysis.

The compiler asked is the one for TPUs: XLA's CPU backend merges what is computed a second time with the first, and keeps it.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

import tiny
from sim_jax import networks, planning, programs, topologies
from sim_jax.models import memory
from sim_jax.types import Cond

UNET = {**tiny.SPEC, "attn_resolutions": (8,), "num_blocks": 2, "dropout": 0.2}
MLP = {"precond": "EDMPrecond", "model_type": "MLP", "img_resolution": 2, "img_channels": 3, "label_dim": 3, "model_channels": 64, "num_blocks": 4}
EDM2 = {"precond": "Precond", "model_type": "EDM2UNet", "img_resolution": 8, "img_channels": 3, "label_dim": 3, "model_channels": 32,
        "channel_mult": (1,), "num_blocks": 2, "attn_resolutions": (8,), "channels_per_head": 16}
FAMILIES = {"unet": UNET, "mlp": MLP, "edm2": EDM2}


@functools.cache
def gradients(family: str, policy: str, batch: int = 64):
    """Loss and gradients in parameters and image."""
    network = networks.build(FAMILIES[family], remat=policy)
    params = tiny.random_params(network.shapes())
    if family == "edm2":
        params = jax.tree_util.tree_map_with_path(lambda path, leaf: np.float32(0.5) if leaf.shape == () else leaf, params)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, *network.image_shape)).astype(np.float32)
    cond = Cond(class_labels=np.eye(3, dtype=np.float32)[rng.integers(0, 3, batch)])
    keys = jax.random.split(jax.random.key(1), batch)

    def loss(params, x):
        return jnp.mean(network.denoise(params, x, jnp.full(batch, 0.7), cond, dropout_keys=keys) ** 2)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, x)


@pytest.mark.parametrize("policy", memory.POLICIES[1:])
@pytest.mark.parametrize("family", ["mlp", pytest.param("unet", marks=pytest.mark.slow), pytest.param("edm2", marks=pytest.mark.slow)])
def test_gradients_do_not_depend_on_the_policy(family, policy):
    value, (params, image) = gradients(family, "none")
    again, (params_again, image_again) = gradients(family, policy)
    assert float(again) == pytest.approx(float(value), rel=1e-5)
    assert tiny.difference(params_again, params) < 1e-4 and tiny.difference(image_again, image) < 1e-4


def kept(policy: str) -> int:
    """Bytes of what the backward pass finds again, by JAX's own account."""
    network = networks.build(UNET, remat=policy)
    x, sigma = jnp.zeros((8, *network.image_shape)), jnp.ones(8)
    back = jax.eval_shape(lambda p: jax.vjp(lambda p: network.denoise(p, x, sigma, Cond(jnp.zeros((8, 3)))), p)[1], network.shapes())
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(back))


def test_policies_keep_less_and_less():
    none, convs, blocks = (kept(policy) for policy in memory.POLICIES)
    assert none > 1.5 * convs > 2 * blocks


@pytest.mark.slow
def test_policies_in_the_order_of_their_memory_on_a_tpu():
    topology = topologies.parse("v5e:1x1")
    if not topologies.compiles(topology):
        pytest.skip("libtpu is not installed (pip install 'libtpu==0.0.42.*' pairs with jax 0.10.2)")
    here = SingleDeviceSharding(topologies.tpu_devices(topology)[0])

    def temporaries(policy: str) -> int:
        network = networks.build({**UNET, "img_resolution": 16, "model_channels": 128, "attn_resolutions": (16,)}, remat=policy)
        place = functools.partial(jax.tree.map, lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here))
        x, sigma, labels = place((jnp.zeros((16, *network.image_shape)), jnp.ones(16), jnp.zeros((16, 3))))
        step = jax.jit(jax.grad(lambda p, x, sigma, labels: jnp.mean(network.denoise(p, x, sigma, Cond(labels)) ** 2)))
        with planning.optimisation("fast"):
            return programs.memory(step.lower(place(network.shapes()), x, sigma, labels).compile())["temporaries"]

    none, convs, blocks = (temporaries(policy) for policy in memory.POLICIES)
    assert blocks < 0.7 * none and blocks < convs < none, (none, convs, blocks)


def test_unknown_policies_are_refused():
    with pytest.raises(ValueError, match="remat: got 'some', allowed: none, convs, blocks"):
        networks.build(UNET, remat="some")
