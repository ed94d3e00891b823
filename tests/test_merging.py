"""Merged functions: the same values and derivatives, with fewer instructions."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import test_cost as recipes
from sim_jax import flops, networks
from sim_jax.merging import merged
from sim_jax.types import Cond

SPEC = {**recipes.UNET, "model_channels": 16}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scaled(by, x):
    return by * x


scaled.defvjp(lambda by, x: (by * x, None), lambda by, _, g: (by * g,))


def branches(w, x):
    """Two times the same, by every kind of instruction that networks are made of."""
    def once():
        h = jnp.sin(x @ w) + jnp.asarray(np.arange(4, dtype=np.float32))[None]
        h = jax.nn.silu(h) + jax.nn.relu(h)
        h = jax.checkpoint(lambda h: scaled(3.0, h) @ w)(h)
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), h, None, length=2)[0]

    return jnp.sum(once() * jax.lax.stop_gradient(once())), once()


def test_values_and_gradients_stay_and_work_is_halved():
    w, x = (jax.random.normal(jax.random.key(i), (4, 4)) for i in range(2))

    def gradient(fn):
        return jax.jit(jax.value_and_grad(lambda w, x: (lambda a, b: a + jnp.sum(b))(*fn(w, x)), argnums=(0, 1)))

    plain, once = gradient(branches)(w, x), gradient(merged(branches))(w, x)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-6), once, plain)
    assert flops.products(merged(branches), w, x) * 3 == flops.products(branches, w, x)


def test_what_differs_is_kept_apart():
    x = jnp.ones((2, 2))

    def different(x):
        return scaled(2.0, x), scaled(3.0, x), x @ x.T, x @ x, x + 1.0, x + jnp.float32(2), x * np.float32([[1, 2]]), x * np.float32([[1, 3]])

    for got, expected in zip(merged(different)(x), different(x), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("remat", ["none", "blocks"])
def test_a_denoiser_and_its_features_become_one_network(remat):
    net = networks.build(SPEC, remat=remat)
    params = net.init(jax.random.key(0))
    x, sigma = jax.random.normal(jax.random.key(1), (2, *net.image_shape)), jnp.array([0.5, 2.0])
    cond = Cond(class_labels=jnp.eye(net.label_dim)[:2])

    def both(x):
        return net.denoise(params, x / 1.0, sigma, cond), net.features(params, x / 1.0, sigma, cond)

    def pull(fn):
        return lambda x: jax.grad(lambda x: sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(fn(x))))(x)

    np.testing.assert_allclose(pull(merged(both))(x), pull(both)(x), rtol=1e-4, atol=1e-5)
    alone = pull(lambda x: net.denoise(params, x, sigma, cond))
    assert flops.products(pull(merged(both)), x) == flops.products(alone, x) < 0.9 * flops.products(pull(both), x)
