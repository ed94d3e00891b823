"""Networks as built from descriptions: sizes, errors, precision, rematerialisation, dropout, and the paths without goldens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from sim_jax import networks, param_table
from sim_jax.types import Cond

# What EDM's train.py passes for its published models, defaults left out.
DDPMPP = dict(model_type="SongUNet", embedding_type="positional", encoder_type="standard", decoder_type="standard", channel_mult_noise=1,
              resample_filter=[1, 1], model_channels=128, channel_mult=[2, 2, 2], augment_dim=9)
NCSNPP = dict(DDPMPP, embedding_type="fourier", encoder_type="residual", channel_mult_noise=2, resample_filter=[1, 3, 3, 1])
SIZES = {
    "cifar10-uncond-vp": (dict(DDPMPP, img_resolution=32, dropout=0.13), 55_733_891),
    "cifar10-cond-vp": (dict(DDPMPP, img_resolution=32, dropout=0.13, label_dim=10), 55_735_299),
    "cifar10-uncond-ve": (dict(NCSNPP, img_resolution=32, dropout=0.13), 56_397_827),
    "ffhq-64-uncond-vp": (dict(DDPMPP, img_resolution=64, channel_mult=[1, 2, 2, 2], dropout=0.05), 61_805_571),
    "imagenet-64-cond-adm": (dict(model_type="DhariwalUNet", model_channels=192, channel_mult=[1, 2, 3, 4], img_resolution=64,
                                  label_dim=1000, dropout=0.1), 295_899_267),
}
RNG = np.random.default_rng(0)


def inputs(net, batch=3):
    x = RNG.standard_normal((batch, *net.image_shape)).astype(np.float32)
    labels = np.eye(net.label_dim, dtype=np.float32)[np.arange(batch) % max(net.label_dim, 1)] if net.label_dim else None
    return x, np.float32([0.1, 1.0, 20.0])[:batch], Cond(class_labels=labels)


@functools.cache
def setup(dropout=0.0):
    net = tiny.network(dropout=dropout)
    return net, tiny.random_params(net.shapes(), 1), inputs(net)


@functools.cache
def evaluated():
    """The network of `setup`, jitted, and its output."""
    net, params, given = setup()
    run = jax.jit(net.denoise)
    return run, run(params, *given)


@pytest.mark.parametrize("name", SIZES)
def test_full_size(name):
    """Parameter counts of the published models, without allocating them."""
    spec, count = SIZES[name]
    net = networks.build({"precond": "EDMPrecond", **spec})
    assert net.num_params() == count
    buffers = 128 if "-ve" in name else 0  # the Fourier frequencies
    assert param_table.count(net.shapes()) == count + buffers


def test_parameters_are_float32_and_named():
    net = tiny.network(dtype="bfloat16")
    table = param_table.flatten(net.shapes())
    assert {leaf.dtype for leaf in table.values()} == {jnp.dtype("float32")}
    assert {"enc.8x8_conv.weight", "enc.8x8_block0.affine.bias", "dec.8x8_in0.qkv.weight", "dec.8x8_aux_conv.weight"} <= set(table)


def test_bfloat16_stays_near():
    """The raw network in 8 bits of mantissa: a per cent off, not more, not nothing; out comes float32."""
    _, params, (x, sigma, cond) = setup()
    exact = evaluated()[1]
    rounded = jax.jit(tiny.network(dtype="bfloat16").denoise)(params, x, sigma, cond)
    assert exact.dtype == rounded.dtype == jnp.float32
    assert 1e-5 < tiny.difference(rounded, exact) < 0.02


def test_remat_changes_nothing():
    """Value and gradients, with dropout on; and the backward pass does compute more."""
    net, params, (x, sigma, cond) = setup(dropout=0.3)
    keys = jax.random.split(jax.random.key(1), 3)

    def gradient(net):
        fn = jax.jit(jax.value_and_grad(lambda p: jnp.sum(net.denoise(p, x, sigma, cond, dropout_keys=keys) ** 2)))
        compiled = fn.lower(params).compile()
        return compiled(params)

    plain, again = gradient(net), gradient(tiny.network(dropout=0.3, remat="blocks"))
    assert float(again[0]) == pytest.approx(float(plain[0]), rel=1e-5)
    for a, b in zip(jax.tree.leaves(again[1]), jax.tree.leaves(plain[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()) + 1e-3)
    text = str(jax.make_jaxpr(lambda p: tiny.network(remat="blocks").denoise(p, x, sigma, cond))(params))
    assert "remat" in text or "checkpoint" in text


def test_dropout_keys():
    """A sample's output follows its key, not its batch or its place in it; without keys dropout is off."""
    net, params, (x, sigma, cond) = setup(dropout=0.3)
    keys = jax.random.split(jax.random.key(1), 3)
    run = jax.jit(lambda x, sigma, labels, keys: net.denoise(params, x, sigma, Cond(labels), dropout_keys=keys))
    whole = np.asarray(run(x, sigma, cond.class_labels, keys))
    order = np.array([2, 0, 1])
    np.testing.assert_allclose(run(x[order], sigma[order], cond.class_labels[order], keys[order]), whole[order], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(run(x[1:2], sigma[1:2], cond.class_labels[1:2], keys[1:2]), whole[1:2], rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(run(x, sigma, cond.class_labels, keys[order])) - whole).max() > 1e-2

    off = np.asarray(jax.jit(net.denoise)(params, x, sigma, cond))
    np.testing.assert_allclose(off, evaluated()[0](params, x, sigma, cond), rtol=1e-6, atol=1e-6)
    assert np.abs(off - whole).max() > 1e-2


def test_absent_labels_are_zeros():
    net = tiny.network(augment_dim=9)
    params = tiny.random_params(net.shapes(), 1)
    x, sigma, _ = inputs(net)
    run = jax.jit(net.denoise)
    absent = run(params, x, sigma, Cond())
    np.testing.assert_array_equal(absent, run(params, x, sigma, Cond(np.zeros((3, 3), np.float32), np.zeros((3, 9), np.float32))))
    for given in (Cond(class_labels=np.eye(3, dtype=np.float32)), Cond(augment_labels=np.ones((3, 9), np.float32))):
        assert np.abs(np.asarray(run(params, x, sigma, given)) - absent).max() > 1e-2


def test_preconditioning_wraps_the_raw_network():
    """D = c_skip x + c_out F(c_in x; c_noise), equation 7; with F = 0 it is c_skip x."""
    net, params, (x, sigma, cond) = setup()
    c_skip, c_out, c_in, c_noise = (np.asarray(c)[:, None, None, None] for c in net.precond.coefficients(sigma))
    raw = jax.jit(net.module.apply)({"params": params}, c_in * x, c_noise[:, 0, 0, 0], cond.class_labels)
    denoise, got = evaluated()
    np.testing.assert_allclose(got, c_skip * x + c_out * np.asarray(raw), rtol=1e-4, atol=1e-4)
    silent = jax.tree.map(np.zeros_like, params)
    np.testing.assert_allclose(denoise(silent, x, sigma, cond), c_skip * x, rtol=1e-6, atol=1e-7)


def test_second_half_of_iddpm_channels_is_dropped():
    """The network says twice the channels; changing the variance half changes nothing."""
    net = tiny.network(precond="iDDPMPrecond")
    params = tiny.random_params(net.shapes(), 1)
    conv = params["dec"]["8x8_aux_conv"]
    assert conv["weight"].shape[-1] == 2
    x, sigma, cond = inputs(net)
    run = jax.jit(net.denoise)
    before = run(params, x, sigma, cond)
    conv["weight"] = conv["weight"] * np.float32([1, 7])
    np.testing.assert_array_equal(run(params, x, sigma, cond), before)


def expand(image, taps):
    """Each pixel spread over the doubled grid with 4 outer(f, f) / sum^2: one axis at a time by a dense matrix."""
    n, pad = image.shape[0], (len(taps) - 1) // 2
    matrix = np.zeros((2 * n, n))
    for m in range(n):
        for j, f in enumerate(taps):
            if 0 <= 2 * m + j - pad < 2 * n:
                matrix[2 * m + j - pad, m] += 2 * f / np.sum(taps)
    return np.einsum("ah,bw,hwc->abc", matrix, matrix, image)


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
def test_skip_decoder(taps):
    """Each resolution adds its own picture to the enlarged one below: with the upper one silent, the output is the lower one's,
    enlarged by the filter."""
    net = tiny.network(channel_mult=(1, 1), decoder_type="skip", resample_filter=taps)
    params = tiny.random_params(net.shapes(), 1)
    for leaf in ("weight", "bias"):
        params["dec"]["8x8_aux_conv"][leaf] = np.zeros_like(params["dec"]["8x8_aux_conv"][leaf])
    params["dec"]["4x4_aux_conv"]["weight"] = np.zeros_like(params["dec"]["4x4_aux_conv"]["weight"])
    params["dec"]["4x4_aux_conv"]["bias"] = np.float32([0.7])
    x, sigma, cond = inputs(net)
    raw = jax.jit(net.module.apply)({"params": params}, x, np.zeros(3, np.float32), cond.class_labels)
    np.testing.assert_allclose(raw[0], expand(np.full((4, 4, 1), 0.7), taps), atol=1e-6)
    if len(taps) > 2:  # the border shows the filter
        assert float(raw[0, 0, 0, 0]) == pytest.approx(0.7 * (3 / 4) ** 2, rel=1e-5)


def test_skip_encoder():
    """The picture, halved, enters each lower resolution through a 1x1 convolution: it matters, and is the filter's."""
    net = tiny.network(channel_mult=(1, 1), encoder_type="skip")
    params = tiny.random_params(net.shapes(), 1)
    assert params["enc"]["4x4_aux_skip"]["weight"].shape == (1, 1, 1, 16) and "4x4_aux_down" not in params["enc"]
    x, sigma, cond = inputs(net)
    run = jax.jit(net.denoise)
    with_picture = run(params, x, sigma, cond)
    without = jax.tree.map(np.array, params)
    without["enc"]["4x4_aux_skip"]["weight"][:] = 0
    assert np.all(np.isfinite(with_picture)) and tiny.difference(run(without, x, sigma, cond), with_picture) > 1e-3


@pytest.mark.parametrize("changes, words", [
    (dict(img_resolutoin=8), ("network.img_resolutoin", "did you mean 'img_resolution'")),
    (dict(model_type="UNet"), ("network.model_type", "'UNet'", "SongUNet")),
    (dict(precond="EDM"), ("precond", "'EDM'", "EDMPrecond")),
    (dict(embedding_type="sine"), ("network.embedding_type", "'sine'", "positional, fourier")),
    (dict(encoder_type="unet"), ("network.encoder_type", "'unet'", "standard, skip, residual")),
    (dict(decoder_type="residual"), ("network.decoder_type", "'residual'", "standard, skip")),
    (dict(channel_mult=(1, 1, 1), img_resolution=10), ("network.img_resolution", "10", "multiple of 4")),
    (dict(img_resolution=0), ("network.img_resolution", "0")),
    (dict(img_resolution="8"), ("network.img_resolution", "'8'")),
    (dict(img_resolution=8.0), ("network.img_resolution", "8.0")),
    (dict(channel_mult=()), ("network.channel_mult", "()")),
    (dict(channel_mult=2), ("network.channel_mult", "2")),
    (dict(model_channels=0), ("network.model_channels", "0")),
    (dict(num_blocks=-1), ("network.num_blocks", "-1")),
    (dict(img_channels=0), ("network.img_channels", "0")),
    (dict(label_dim=-1), ("network.label_dim", "-1")),
    (dict(dropout=1.0), ("network.dropout", "1.0")),
    (dict(resample_filter=(1, 2, 1)), ("network.resample_filter", "(1, 2, 1)")),
    (dict(attn_resolutions=16), ("network.attn_resolutions", "16")),
    (dict(dropout=-0.1), ("network.dropout", "-0.1")),
    (dict(beta_d=19.9), ("network.beta_d", "unknown")),           # a knob of another preconditioner
    (dict(model_type="DhariwalUNet", encoder_type="skip"), ("network.encoder_type", "unknown")),
])
def test_bad_descriptions(changes, words):
    spec = {**tiny.SPEC, **changes}
    with pytest.raises(ValueError) as error:
        networks.build(spec)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_other_bad_arguments():
    with pytest.raises(ValueError, match="network.img_resolution: missing"):
        networks.build({"precond": "EDMPrecond"})
    with pytest.raises(ValueError, match="dtype: got 'float16', allowed: float32, bfloat16"):
        networks.build(tiny.SPEC, dtype="float16")
    with pytest.raises(ValueError, match="dropout: got 1.5"):
        networks.build(tiny.SPEC, dropout=1.5)


def test_differences():
    """Lists and defaults compare by meaning; what only training sees does not count; the rest is named with both values."""
    spec = dict(tiny.SPEC)
    assert networks.differences(spec, {**spec, "channel_mult": [1], "resample_filter": [1, 1], "dropout": 0.5, "use_fp16": True}) == []
    assert networks.differences(spec, {**spec, "label_dim": 4}) == ["label_dim: 3 != 4"]
    assert networks.differences(spec, {**spec, "sigma_data": 1.0}) == ["sigma_data: 0.5 != 1.0"]
    assert networks.differences(spec, {**spec, "sigma_data": 0.5}) == []
