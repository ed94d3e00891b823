"""Discriminators: DMD2's head against its formula written out in numpy, sizes of the published ones, SiDA's mean, gradients."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from sim_jax import networks, param_table
from sim_jax.discriminator import Discriminator
from sim_jax.models.discriminator import Heads
from sim_jax.types import Cond

RNG = np.random.default_rng(0)
SPEC = dict(tiny.SPEC, channel_mult=(1, 2))
X = RNG.standard_normal((3, 8, 8, 1)).astype(np.float32)
SIGMA = np.float32([0.1, 1.0, 20.0])
COND = Cond(class_labels=np.eye(3, dtype=np.float32))
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def setup(dtype="float32", resolutions=(8, 4), head="conv"):
    made = Discriminator(networks.build(SPEC, dtype=dtype), resolutions, head)
    return made, tiny.random_params(made.backbone.shapes(), 1), tiny.random_params(made.shapes(), 2)


def convolve(x, weight, bias, stride, pad):
    """[B,H,W,in], HWIO -> [B,H',W',out] in float64, one output pixel at a time."""
    k = weight.shape[0]
    x = np.pad(np.float64(x), ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    rows, cols = ((n - k) // stride + 1 for n in x.shape[1:3])
    out = np.zeros((x.shape[0], rows, cols, weight.shape[-1]))
    for i in range(rows):
        for j in range(cols):
            window = x[:, i * stride:i * stride + k, j * stride:j * stride + k]
            out[:, i, j] = np.einsum("bhwc,hwco->bo", window, np.float64(weight)) + bias
    return out


def norm_silu(x, weight, bias):
    """Group normalisation with PyTorch's eps, at least four channels a group, then x sigmoid(x)."""
    b, h, w, c = x.shape
    groups = min(32, c // 4)
    y = x.reshape(b, h, w, groups, c // groups)
    y = (y - y.mean((1, 2, 4), keepdims=True)) / np.sqrt(y.var((1, 2, 4), keepdims=True) + 1e-5)
    y = y.reshape(x.shape) * weight + bias
    return y / (1 + np.exp(-y))


def head(x, params):
    """DMD2's sequence: places 0, 3, ... are convolutions, 1, 4, ... normalisations."""
    place = 0
    while place == 0 or x.shape[1] > 1:
        size = x.shape[1]
        conv, norm = params[str(place)], params[str(place + 1)]
        x = convolve(x, conv["weight"], conv["bias"], *((2, 1) if size > 4 else (1, 0)))
        x = norm_silu(x, norm["weight"], norm["bias"])
        place += 3
    assert len(params) == 2 * place // 3 + 1
    return convolve(x, params[str(place)]["weight"], params[str(place)]["bias"], 1, 0)[:, 0, 0]


@pytest.mark.parametrize("size, channels, kernels", [
    (16, 8, (4, 4, 4, 1)), (8, 160, (4, 4, 1)), (7, 8, (4, 3, 1)), (4, 12, (4, 1)), (2, 8, (2, 1)), (1, 16, (1, 1))])
def test_the_conv_head_is_dmd2s(size, channels, kernels):
    """8x8 -> 4x4 -> 1x1 as published, more halvings above, and the valid convolution as large as a smaller map."""
    x = RNG.standard_normal((2, size, size, channels)).astype(np.float32)
    shapes = jax.eval_shape(lambda: Heads().init(jax.random.key(0), [x])["params"])
    weights = [leaf.shape[0] for name, leaf in param_table.flatten(shapes).items() if len(leaf.shape) == 4]
    assert tuple(weights) == kernels
    params = tiny.random_params(shapes)
    got = jit(Heads().apply)({"params": params}, [x])
    want = head(x, params["discriminator_heads"]["0"])
    assert got.dtype == jnp.float32 and got.shape == (2, 1)
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)


def test_logits_are_heads_of_the_backbones_features_in_order():
    made, backbone, heads = setup()
    maps, logits = jit(lambda b, h: (made.backbone.features(b, X, SIGMA, COND, resolutions=(8, 4)),
                                     made.bind(b, h)(X, SIGMA, COND)))(backbone, heads)
    want = np.concatenate([head(np.asarray(m), heads["discriminator_heads"][str(i)]) for i, m in enumerate(maps)], axis=1)
    assert logits.shape == (3, 2)
    np.testing.assert_allclose(logits, want, rtol=2e-3, atol=2e-4)


def test_published_sizes():
    """DMD2's head on ImageNet-64's bottleneck of 768 channels, and FastGen's three heads on CIFAR-10's maps of 256, by hand."""
    adm = networks.build(dict(model_type="DhariwalUNet", img_resolution=64, label_dim=1000))
    made = Discriminator(adm)
    assert adm.feature_shapes() == [(8, 8, 768)]
    assert made.num_params() == 2 * (4 * 4 * 768 * 768 + 768) + 2 * 2 * 768 + 768 + 1 == 18_879_745
    names = param_table.flatten(made.shapes())
    assert {name.removeprefix("discriminator_heads.0.") for name in names} == {
        f"{place}.{leaf}" for place in (0, 1, 3, 4, 6) for leaf in ("weight", "bias")}
    song = networks.build(dict(model_type="SongUNet", img_resolution=32, channel_mult=(2, 2, 2)))
    made = Discriminator(song, (32, 16, 8))
    assert made.num_params() == (4 + 3 + 2) * (4 * 4 * 256 * 256 + 256 + 2 * 256) + 3 * (256 + 1)


def test_initial_values_are_pytorchs():
    """Uniform in plus and minus 1 / sqrt(fan in), weights and biases; normalisations at one and zero."""
    made, *_ = setup()
    table = param_table.flatten(jit(made.init)(jax.random.key(1)))
    for name, leaf in table.items():
        place = int(name.split(".")[2])
        if place % 3 == 1:
            np.testing.assert_array_equal(leaf, 1.0 if name.endswith("weight") else 0.0)
            continue
        fan_in = np.prod(table[name.rsplit(".", 1)[0] + ".weight"].shape[:-1])
        assert np.abs(leaf).max() <= fan_in**-0.5
        if leaf.size > 1000:
            assert np.std(leaf) == pytest.approx((3 * fan_in) ** -0.5, rel=0.05)


def test_the_mean_head_has_no_parameters():
    """SiDA: the channels' mean at every pixel of the lowest map."""
    made, backbone, _ = setup(resolutions=(), head="mean")
    assert made.init(jax.random.key(0)) == {} and made.num_params() == 0
    maps, logits = jit(lambda b: (made.backbone.features(b, X, SIGMA, COND), made.bind(b, {})(X, SIGMA, COND)))(backbone)
    np.testing.assert_allclose(logits, np.asarray(maps[0]).mean(-1).reshape(3, 16), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["conv", "mean"])
def test_gradients_reach_image_backbone_and_heads(kind):
    made, backbone, heads = setup(head=kind)
    grads = jit(jax.grad(lambda x, b, h: jnp.sum(jax.nn.softplus(-made.bind(b, h)(x, SIGMA, COND))), argnums=(0, 1, 2)))(X, backbone, heads)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))
    assert np.abs(grads[0]).max() > 1e-6
    assert all(np.any(leaf) for name, leaf in param_table.flatten(grads[1]["enc"]).items() if name.endswith("weight"))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads[1]["dec"]))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(grads[2])) and bool(grads[2]) == (kind == "conv")


def test_a_step_against_the_loss_lowers_it():
    """Real at plus one, generated at minus one: a few steps of the heads alone tell them apart, over a frozen backbone."""
    made, backbone, heads = setup()
    real, fake = 1 + 0.1 * X, -1 + 0.1 * X
    sigma = np.full(3, 0.5, np.float32)

    def loss(h):
        discriminate = made.bind(backbone, h)
        return jnp.mean(jax.nn.softplus(discriminate(fake, sigma, COND)) + jax.nn.softplus(-discriminate(real, sigma, COND)))

    step = jit(lambda h: jax.tree.map(lambda p, g: p - 0.02 * g, h, jax.grad(loss)(h)))
    first = float(jit(loss)(heads))
    for _ in range(20):
        heads = step(heads)
    assert first > 1.0 and float(jit(loss)(heads)) < 0.4  # 2 log 2 = 1.39 is knowing nothing


def test_bfloat16_stays_near():
    made, backbone, heads = setup()
    run = lambda made: np.asarray(jit(lambda b, h: made.bind(b, h)(X, SIGMA, COND))(backbone, heads))
    half = run(setup("bfloat16")[0])
    assert half.dtype == np.float32 and 1e-5 < np.abs(half - run(made)).max() < 0.1


def test_refusals():
    network = networks.build(SPEC)
    with pytest.raises(ValueError, match="gan.head: got 'linear', allowed: conv, mean"):
        Discriminator(network, head="linear")
    with pytest.raises(ValueError, match=r"gan.resolutions: got \(2,\), allowed: different ones of 8, 4"):
        Discriminator(network, (2,))
