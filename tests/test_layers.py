"""Layers against direct definitions: resampling, normalisation, attention, initialisation."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sim_jax.models import layers

FILTERS = [(1, 1), (1, 3, 3, 1), (1, 2, 4, 3), (1, 2, 3)]
RNG = np.random.default_rng(0)


def outer(taps):
    taps = np.asarray(taps, np.float64)
    return np.outer(taps, taps) / taps.sum() ** 2


def direct_down(x, taps, pad):
    """y[n] = sum_j f[j] x[2 n + j - pad] in both axes, zeros outside: cross-correlation with stride 2."""
    f, (b, h, w, c) = outer(taps), x.shape
    k = len(taps)
    padded = np.pad(np.float64(x), ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    rows, cols = (h + 2 * pad - k) // 2 + 1, (w + 2 * pad - k) // 2 + 1
    out = np.zeros((b, rows, cols, c))
    for i in range(rows):
        for j in range(cols):
            out[:, i, j] = np.einsum("bhwc,hw->bc", padded[:, 2 * i : 2 * i + k, 2 * j : 2 * j + k], f)
    return out


def direct_up(x, taps):
    """Each input pixel m adds 4 f[j] x[m] to the output at 2 m + j - pad: the transpose of the above."""
    f, (b, h, w, c) = 4 * outer(taps), x.shape
    k, pad = len(taps), (len(taps) - 1) // 2
    out = np.zeros((b, 2 * h + 2 * k, 2 * w + 2 * k, c))
    for i in range(h):
        for j in range(w):
            out[:, 2 * i : 2 * i + k, 2 * j : 2 * j + k] += f[None, :, :, None] * np.float64(x)[:, i, j][:, None, None]
    size = lambda n: 2 * (n - 1) + k - 2 * pad  # noqa: E731, what a transposed convolution returns
    return out[:, pad : pad + size(h), pad : pad + size(w)]


@pytest.mark.parametrize("taps", FILTERS)
def test_downsample(taps):
    x = RNG.standard_normal((2, 8, 6, 3)).astype(np.float32)
    np.testing.assert_allclose(layers.downsample(x, taps), direct_down(x, taps, (len(taps) - 1) // 2), atol=1e-6)
    np.testing.assert_allclose(layers.downsample(x, taps, pad=0), direct_down(x, taps, 0), atol=1e-6)


@pytest.mark.parametrize("taps", [f for f in FILTERS if len(f) % 2 == 0])
def test_upsample(taps):
    x = RNG.standard_normal((2, 4, 3, 3)).astype(np.float32)
    got = layers.upsample(x, taps)
    assert got.shape == (2, 8, 6, 3)
    np.testing.assert_allclose(got, direct_up(x, taps), atol=1e-6)


@pytest.mark.parametrize("taps", [f for f in FILTERS if len(f) % 2 == 0])
def test_up_is_four_times_the_transpose_of_down(taps):
    """<down(x), y> = <x, up(y)> / 4."""
    x, y = (RNG.standard_normal((1, n, n, 2)).astype(np.float32) for n in (8, 4))
    left, right = np.vdot(layers.downsample(x, taps), y), np.vdot(x, layers.upsample(y, taps)) / 4
    assert left == pytest.approx(right, rel=1e-5)


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
@pytest.mark.parametrize("fused", [False, True])
def test_convolution_with_downsampling(taps, fused):
    """Fused: all padding at once, kernel, then filter without padding. Else: filter, then kernel, each with its own padding."""
    x = RNG.standard_normal((1, 8, 8, 2)).astype(np.float32)
    layer = layers.Conv2d(3, 3, down=True, fused_down=fused, resample_filter=taps)
    params = {"weight": RNG.standard_normal((3, 3, 2, 3)).astype(np.float32), "bias": np.float32([1, 2, 3])}

    def conv(x, pad):
        padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        n = padded.shape[1] - 2
        return sum(np.einsum("bhwi,io->bhwo", padded[:, i : i + n, j : j + n], np.float64(params["weight"])[i, j])
                   for i in range(3) for j in range(3))

    pad = (len(taps) - 1) // 2
    expected = direct_down(conv(x, 1 + pad), taps, 0) if fused else conv(direct_down(x, taps, pad), 1)
    np.testing.assert_allclose(layer.apply({"params": params}, x), expected + np.float64([1, 2, 3]), atol=2e-5)


@pytest.mark.parametrize("channels, groups", [(8, 2), (48, 12), (256, 32)])
def test_group_norm(channels, groups):
    """min(32, C // 4) groups; float64 numpy, with an offset that a one-pass variance would not survive."""
    x = (RNG.standard_normal((2, 4, 4, channels)) + 300).astype(np.float32)
    params = {k: RNG.standard_normal(channels).astype(np.float32) for k in ("weight", "bias")}
    grouped = np.float64(x).reshape(2, 16, groups, -1)
    mean, var = grouped.mean((1, 3), keepdims=True), grouped.var((1, 3), keepdims=True)
    expected = ((grouped - mean) / np.sqrt(var + 1e-2)).reshape(x.shape) * params["weight"] + params["bias"]
    np.testing.assert_allclose(layers.GroupNorm(eps=1e-2).apply({"params": params}, x), expected, atol=3e-4)


def test_group_norm_in_bfloat16():
    """Statistics stay in float32: only the output is rounded, to 8 bits."""
    x = RNG.standard_normal((2, 4, 4, 8)).astype(np.float32) * 5 + 100
    params = {"weight": np.ones(8, np.float32), "bias": np.zeros(8, np.float32)}
    exact = layers.GroupNorm().apply({"params": params}, x)
    rounded = layers.GroupNorm(dtype=jnp.bfloat16).apply({"params": params}, x)
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(rounded), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("mode, variance", [
    ("xavier_uniform", 2 / (300 + 500)), ("xavier_normal", 2 / (300 + 500)), ("kaiming_uniform", 1 / 300), ("kaiming_normal", 1 / 300)])
def test_initialisation(mode, variance):
    """Variances of EDM's four modes, times scale^2; uniform ones stop at sqrt(3) standard deviations."""
    draw = np.asarray(layers._initializer(mode, 300, 500, 0.7)(jax.random.key(0), (400, 500)))
    std = 0.7 * np.sqrt(variance)
    assert draw.std() == pytest.approx(std, rel=0.01) and abs(draw.mean()) < 0.01 * std
    largest = np.abs(draw).max() / std
    assert largest == pytest.approx(np.sqrt(3), rel=1e-3) if mode.endswith("uniform") else largest > 3.5
    assert not np.any(layers._initializer(mode, 300, 500, 0.0)(jax.random.key(0), (4, 5)))


def test_convolution_fan_in_counts_the_kernel():
    layer = layers.Conv2d(64, 3, init=layers.Init("kaiming_normal", weight=1.0, bias=2.0))
    apply = lambda layer, x: layer(x)  # noqa: E731, the field `init` hides the method
    params = nn.init(apply, layer)(jax.random.key(0), np.zeros((1, 4, 4, 32), np.float32))["params"]
    assert params["weight"].std() == pytest.approx(np.sqrt(1 / (9 * 32)), rel=0.03)
    assert params["bias"].std() == pytest.approx(2 * np.sqrt(1 / (9 * 32)), rel=0.4)


def test_attention():
    """Softmax over keys of <q, k> / sqrt(channels), head by head."""
    q, k, v = RNG.standard_normal((3, 2, 5, 3, 4)).astype(np.float32)
    scores = np.einsum("bthc,bshc->bhts", np.float64(q), np.float64(k)) / 2
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    np.testing.assert_allclose(layers.attention(q, k, v), np.einsum("bhts,bshc->bthc", weights, v), atol=2e-6)


@pytest.mark.parametrize("endpoint", [False, True])
def test_positional_embedding(endpoint):
    """cos then sin of x / 10000^(i / (half - endpoint))."""
    x = np.float32([0, 0.3, 7, 999])
    i = np.arange(4)
    angle = x[:, None] * 10000.0 ** (-i / (4 - endpoint))
    got = layers.positional_embedding(jnp.asarray(x), 8, endpoint=endpoint)
    np.testing.assert_allclose(got, np.concatenate([np.cos(angle), np.sin(angle)], 1), atol=1e-4)


def test_dropout_scales_and_is_per_sample():
    """Means are kept; a sample's mask follows its key, another layer's mask does not."""
    x, keys = np.ones((6, 16, 16, 4), np.float32), jax.random.split(jax.random.key(0), 6)
    out = np.asarray(layers.dropout(x, 0.25, keys, "enc/block0"))
    assert set(np.unique(out)) == {0, np.float32(1 / 0.75)} and out.mean() == pytest.approx(1, abs=0.03)
    np.testing.assert_array_equal(layers.dropout(x[2:4], 0.25, keys[2:4], "enc/block0"), out[2:4])
    assert np.mean(out[0] != out[1]) > 0.2
    assert np.mean(np.asarray(layers.dropout(x, 0.25, keys, "enc/block1")) != out) > 0.2
    assert layers.dropout(x, 0.25, None, "enc/block0") is x


@pytest.mark.parametrize("rate", [0.13, 0.5, 0.9])
def test_dropout_s_halves_of_random_numbers_are_two(rate):
    """Rows draw from the lower and the upper halves of the same numbers: both at the rate, neither the other's copy; odd heights, too."""
    kept = np.asarray(layers.dropout(jnp.ones((4, 63, 32, 32)), rate, jax.random.split(jax.random.key(3), 4), "a")) > 0
    low, high = kept[:, :31], kept[:, 32:]
    deviation = (rate * (1 - rate) / low.size) ** 0.5
    assert abs(low.mean() - (1 - rate)) < 4 * deviation and abs(high.mean() - (1 - rate)) < 4 * deviation
    assert abs(np.corrcoef(low.ravel(), high.ravel())[0, 1]) < 4 / low.size**0.5


def test_parts_come_one_after_the_other():
    """Channel 3 i + j of the weight is channel i of part j; a part held still gets no gradient in its biases."""
    x = jnp.asarray(RNG.standard_normal((2, 4, 4, 5)), jnp.float32)
    plain, parted = layers.Conv2d(12, 1), layers.Conv2d(12, 1, parts=3, still_part=1)
    params = {"params": {"weight": jnp.asarray(RNG.standard_normal((1, 1, 5, 12)), jnp.float32), "bias": jnp.arange(12.0)}}
    direct = np.asarray(x) @ np.asarray(params["params"]["weight"])[0, 0] + np.arange(12.0)
    np.testing.assert_allclose(plain.apply(params, x), direct, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(parted.apply(params, x), np.concatenate([direct[..., j::3] for j in range(3)], -1), rtol=1e-5, atol=1e-5)
    bias = jax.grad(lambda p: parted.apply(p, x).sum())(params)["params"]["bias"]
    np.testing.assert_array_equal(bias == 0, np.arange(12) % 3 == 1)


def test_label_dropout():
    """Whole rows go to zero, at the given rate, by each sample's key."""
    labels, keys = np.ones((2000, 3), np.float32), jax.random.split(jax.random.key(0), 2000)
    out = np.asarray(layers.drop_labels(labels, 0.1, keys))
    assert set(map(tuple, out)) == {(0, 0, 0), (1, 1, 1)} and out.mean() == pytest.approx(0.9, abs=0.03)
    np.testing.assert_array_equal(layers.drop_labels(labels[5:9], 0.1, keys[5:9]), out[5:9])


def test_bias_of_the_attention_keys():
    """It changes nothing, since softmax ignores what all logits share, so its gradient is exactly zero: rounding would become full
    steps of Adam, different ones on every number of devices."""
    block = layers.UNetBlock(8, num_heads=2)
    x, emb = jax.random.normal(jax.random.key(0), (2, 4, 4, 8)), jax.random.normal(jax.random.key(1), (2, 5))
    params = jax.tree.map(lambda p: p + 0.3 * jax.random.normal(jax.random.key(p.size), p.shape),
                          nn.init(layers.UNetBlock.__call__, block)(jax.random.key(2), x, emb)["params"])
    keys = np.arange(24) % 3 == 1

    def out(bias):
        return block.apply({"params": {**params, "qkv": {**params["qkv"], "bias": bias}}}, x, emb)

    bias = params["qkv"]["bias"]
    np.testing.assert_allclose(out(bias + 2.0 * keys), out(bias), atol=2e-5)
    assert float(jnp.abs(out(bias + 2.0 * ~keys) - out(bias)).max()) > 0.1
    gradient = jax.grad(lambda b: jnp.sum(jnp.sin(out(b))))(bias)
    assert not np.any(gradient[keys])
    assert np.all(gradient[~keys] != 0)
