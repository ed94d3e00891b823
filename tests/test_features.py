"""`Network.features`: the encoder's maps, which the decoder reads, without the decoder."""

from __future__ import annotations

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from sim_jax import networks
from sim_jax.types import Cond

COMMON = dict(img_resolution=8, img_channels=2, label_dim=3, channel_mult=(1, 2), num_blocks=1, dropout=0.0)
SPECS = {
    "song": dict(COMMON, model_type="SongUNet", model_channels=16, attn_resolutions=(4,)),
    "song_residual": dict(COMMON, model_type="SongUNet", model_channels=16, attn_resolutions=(), encoder_type="residual", num_blocks=2),
    "song_skip": dict(COMMON, model_type="SongUNet", model_channels=16, attn_resolutions=(), encoder_type="skip"),
    "adm": dict(COMMON, model_type="DhariwalUNet", model_channels=64, attn_resolutions=(4,)),
    "edm2": dict(COMMON, model_type="EDM2UNet", model_channels=8, attn_resolutions=(4,), channels_per_head=4),
}
RNG = np.random.default_rng(0)
X = RNG.standard_normal((3, 8, 8, 2)).astype(np.float32)
SIGMA = np.float32([0.1, 1.0, 20.0])
COND = Cond(class_labels=np.eye(3, dtype=np.float32))
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiling is what takes the time here


@functools.cache
def setup(name, **changes):
    network = networks.build({**SPECS[name], **changes})
    params = tiny.random_params(network.shapes(), 1)
    return network, jax.tree.map(lambda p: p if p.shape else np.float32(0.5), params)


def decoder_inputs(network, params):
    """{resolution: what the first block behind a concatenation in the decoder is given} during `denoise`, and the lowest's `in0`."""
    seen = {}

    def watch(call, args, kwargs, context):
        path = context.module.path
        if context.method_name == "__call__" and "dec" in path and path[-1].endswith(("_block0", "_in0")):
            seen[path[-1]] = args[0]
        return call(*args, **kwargs)

    with nn.intercept_methods(watch):
        denoised = network.denoise(params, X, SIGMA, COND)
    return denoised, seen


@pytest.mark.parametrize("name", SPECS)
def test_features_are_what_the_decoder_reads(name):
    network, params = setup(name)

    @jit
    def run(params):
        _, seen = decoder_inputs(network, params)
        return network.features(params, X, SIGMA, COND, resolutions=(4, 8)), network.features(params, X, SIGMA, COND), seen

    maps, lowest, seen = run(params)
    assert [m.shape[1:] for m in maps] == network.feature_shapes((4, 8)) and network.feature_shapes() == [maps[0].shape[1:]]
    np.testing.assert_array_equal(lowest[0], maps[0])
    assert len(lowest) == 1 and all(m.dtype == jnp.float32 and m.std() > 1e-2 for m in maps)
    np.testing.assert_array_equal(seen["4x4_in0"], maps[0])
    for m, where in zip(maps, ("4x4_block0", "8x8_block0"), strict=True):
        given = np.asarray(seen[where])
        skip, channels = given[..., -m.shape[-1]:], given.shape[-1]
        if name == "edm2":  # magnitude-preserving concatenation, equation 103 at t = 1/2
            skip = skip / math.sqrt(channels / m.shape[-1] / 2)
        np.testing.assert_allclose(skip, m, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["song", "adm", "edm2"])
def test_noise_labels_and_gradients_reach_the_features(name):
    """Every input of `denoise` that the encoder sees changes them; the gradient with respect to x and to the encoder is there, and to
    the decoder it is zero."""
    network, params = setup(name)
    weight = RNG.standard_normal((3, *network.feature_shapes()[0])).astype(np.float32)

    @jit
    def run(params, x, sigma, labels):
        loss = lambda params, x: jnp.sum(weight * network.features(params, x, sigma, Cond(labels))[0])
        return network.features(params, x, sigma, Cond(labels))[0], *jax.grad(loss, argnums=(0, 1))(params, x)

    base, grad_params, grad_x = run(params, X, SIGMA, COND.class_labels)
    assert tiny.difference(run(params, X, SIGMA * 1.1, COND.class_labels)[0], base) > 1e-4
    assert tiny.difference(run(params, X, SIGMA, COND.class_labels[::-1])[0], base) > 1e-3
    assert np.all(np.isfinite(grad_x)) and np.abs(grad_x).max() > 1e-4
    inner = grad_params.get("unet", grad_params)
    assert all(np.any(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(inner["enc"]) if "bias" not in str(path[-1]))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(inner["dec"]))
    # a directional derivative, by differences
    step = 1e-3 * RNG.standard_normal(X.shape).astype(np.float32) * SIGMA[:, None, None, None]
    up, down = (float(np.sum(weight * np.asarray(run(params, X + s * step, SIGMA, COND.class_labels)[0], np.float64))) for s in (1, -1))
    assert up - down == pytest.approx(2 * float(np.sum(np.asarray(grad_x, np.float64) * step)), rel=0.02)


def flops(function, *args) -> float:
    return jit(function).lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("name", ["song", "adm", "edm2"])
def test_the_encoder_is_paid_once(name):
    """Features cost less than a denoiser call, the highest map less than the lowest, and both together what the denoiser costs."""
    network, params = setup(name)
    features = lambda params, x: network.features(params, x, SIGMA, COND)[0]
    denoise = lambda params, x: network.denoise(params, x, SIGMA, COND)
    encoder, whole = flops(features, params, X), flops(denoise, params, X)
    both = flops(lambda params, x: (features(params, x), denoise(params, x)), params, X)
    assert 0.1 * whole < encoder < 0.5 * whole
    assert both < 1.01 * whole
    assert flops(lambda params, x: network.features(params, x, SIGMA, COND, resolutions=(8,))[0], params, X) < 0.6 * encoder


def test_dropout_is_the_denoisers():
    """With the same keys the features of training are those inside the denoiser."""
    network, params = setup("song", dropout=0.4)
    keys = jax.random.split(jax.random.key(0), 3)

    @jit
    def run(params):
        seen = {}

        def watch(call, args, kwargs, context):
            out = call(*args, **kwargs)
            if context.module.path == ("enc", "4x4_block0"):
                seen["map"] = out
            return out

        with nn.intercept_methods(watch):
            network.denoise(params, X, SIGMA, COND, dropout_keys=keys)
        return network.features(params, X, SIGMA, COND, dropout_keys=keys)[0], network.features(params, X, SIGMA, COND)[0], seen["map"]

    dropped, plain, inside = run(params)
    np.testing.assert_array_equal(dropped, inside)
    assert tiny.difference(dropped, plain) > 0.05


def test_resolutions():
    network, _ = setup("adm")
    assert network.feature_shapes((8, 4)) == [(8, 8, 64), (4, 4, 128)]
    for wanted in ((16,), (8, 8), (4, 5)):
        with pytest.raises(ValueError, match=r"gan.resolutions: got \(.*\), allowed: different ones of 8, 4"):
            network.feature_shapes(wanted)
    with pytest.raises(ValueError, match="gan.resolutions"):
        network.features({}, X, SIGMA, resolutions=(2,))
