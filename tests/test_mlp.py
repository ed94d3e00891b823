"""The network for points: against its formula in numpy, as a description, its features, and what it can learn."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tiny
from sim_jax import load, networks, param_table, weights
from sim_jax.diffusion import samplers
from sim_jax.discriminator import Discriminator
from sim_jax.models import gaussian_mixture
from sim_jax.types import Cond

SPEC = dict(model_type="MLP", img_resolution=1, img_channels=2, label_dim=3, model_channels=16, num_blocks=2, input_frequencies=2)
RNG = np.random.default_rng(0)
X = RNG.standard_normal((3, 1, 1, 2)).astype(np.float32)
SIGMA = np.float32([0.1, 1.0, 20.0])
COND = Cond(class_labels=np.eye(3, dtype=np.float32))
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def setup(*, dtype="float32", remat="none", **changes):
    network = networks.build({**SPEC, **changes}, dtype=dtype, remat=remat)
    return network, tiny.random_params(network.shapes(), 1)


def silu(x):
    return x / (1 + np.exp(-x))


def norm(x):
    x = x - x.mean(1, keepdims=True)
    return x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-5)


def by_hand(params, x, sigma, labels, frequencies, sigma_data=0.5):
    """(D, last hidden layer) in float64: EDM's embedding and preconditioning, waves of the input, two modulated residual layers."""
    p = {name: np.float64(leaf) for name, leaf in param_table.flatten(params).items()}

    def linear(name, x):
        return x @ p[f"{name}.weight"] + p[f"{name}.bias"]

    x, sigma = np.float64(x), np.float64(sigma)[:, None]
    total = sigma**2 + sigma_data**2
    angle = np.log(sigma) / 4 * 10000.0 ** (-np.arange(8) / 7)
    emb = np.concatenate([np.cos(angle), np.sin(angle)], axis=1) + linear("map_label", labels * 3**0.5)
    emb = silu(linear("map_layer1", silu(linear("map_layer0", emb))))
    point = x.reshape(len(x), -1) / np.sqrt(total)
    waves = [wave(factor * point) for factor in (1, 2, 4, 8)[:frequencies] for wave in (np.sin, np.cos)]
    h = linear("enc.in", np.concatenate([point, *waves], axis=1))
    for block in ("enc.block0", "enc.block1"):
        scale, shift = np.split(linear(f"{block}.affine", emb), 2, axis=1)
        h = h + linear(f"{block}.linear", silu(norm(h) * (1 + scale) + shift))
    raw = linear("out", silu(norm(h))).reshape(x.shape)
    total, sigma = total[..., None, None], sigma[..., None, None]
    return sigma_data**2 / total * x + sigma * sigma_data / np.sqrt(total) * raw, h


@pytest.mark.parametrize("shape, frequencies", [((1, 1, 2), 0), ((1, 1, 2), 4), ((3, 3, 1), 2)])
def test_formula(shape, frequencies):
    """Points and small images, whose pixels are all inputs of the first layer."""
    network, params = setup(img_resolution=shape[0], img_channels=shape[2], input_frequencies=frequencies)
    x = RNG.standard_normal((3, *shape)).astype(np.float32)
    got, maps = jit(lambda p: (network.denoise(p, x, SIGMA, COND), network.features(p, x, SIGMA, COND)))(params)
    denoised, hidden = by_hand(params, x, SIGMA, COND.class_labels, frequencies)
    np.testing.assert_allclose(got, denoised, rtol=2e-5, atol=2e-5)
    assert network.feature_shapes() == [(1, 1, 16)] and maps[0].shape == (3, 1, 1, 16)
    np.testing.assert_allclose(maps[0][:, 0, 0], hidden, rtol=2e-5, atol=2e-5)


def test_description():
    """Nothing of U-Nets in it, and nothing of them accepted; names and numbers as counted by hand."""
    network, _ = setup()
    assert set(network.spec) == {"precond", "model_type", "img_resolution", "img_channels", "use_fp16", "label_dim", "model_channels",
                                 "channel_mult_emb", "num_blocks", "input_frequencies", "dropout", "label_dropout", "embedding_type",
                                 "channel_mult_noise"}
    assert network.spec["precond"] == "EDMPrecond" and network.augment_dim == 0
    layers = {"map_label": (3, 16), "map_layer0": (16, 16), "map_layer1": (16, 16), "enc.in": (2 + 4 * 2, 16), "out": (16, 2)}
    layers |= {f"enc.block{i}.{name}": size for i in (0, 1) for name, size in (("affine", (16, 32)), ("linear", (16, 16)))}
    shapes = {name: leaf.shape for name, leaf in param_table.flatten(network.shapes()).items()}
    assert shapes == {f"{name}.weight": size for name, size in layers.items()} | {f"{name}.bias": size[1:] for name, size in layers.items()}
    assert network.num_params() == sum(a * b + b for a, b in layers.values())
    fourier = networks.build({**SPEC, "embedding_type": "fourier", "channel_mult_noise": 2, "channel_mult_emb": 3})
    assert {name: leaf.shape for name, leaf in param_table.flatten(fourier.shapes()).items()}["map_noise.freqs"] == (16,)
    for change, words in (({"channel_mult": (1,)}, "network.channel_mult: unknown"), ({"augment_dim": 9}, "network.augment_dim: unknown"),
                          ({"num_blocks": 0}, "network.num_blocks: got 0"),
                          ({"input_frequencies": -1}, "network.input_frequencies: got -1"),
                          ({"embedding_type": "sine"}, "got 'sine'"),
                          ({"precond": "Precond"}, "network.model_type: got 'MLP' with precond 'Precond', allowed: EDM2UNet")):
        with pytest.raises(ValueError, match=words):
            networks.build({**SPEC, **change})
    with pytest.raises(ValueError, match="gan.resolutions: got .4,., allowed: different ones of 1"):
        network.feature_shapes((4,))


def test_initial_values():
    """Blocks are the identity and the output zero, so that D is c_skip x; everything else is drawn."""
    network, _ = setup()
    params = jit(network.init)(jax.random.key(0))
    for name, leaf in param_table.flatten(params).items():
        assert np.any(leaf) != name.startswith(("enc.block0.linear", "enc.block1.linear", "out")), name
    np.testing.assert_allclose(jit(network.denoise)(params, X, SIGMA, COND), 0.25 / (SIGMA**2 + 0.25)[:, None, None, None] * X, rtol=1e-5)


@pytest.mark.parametrize("precond", ["VPPrecond", "iDDPMPrecond"])
def test_other_preconditioners(precond):
    network, params = setup(precond=precond, img_channels=3)
    x = RNG.standard_normal((3, 1, 1, 3)).astype(np.float32)
    out = jit(network.denoise)(params, x, SIGMA, COND)
    assert out.shape == x.shape and np.all(np.isfinite(out))
    assert params["out"]["weight"].shape == (16, 6 if precond == "iDDPMPrecond" else 3)


def test_precision_rematerialisation_and_dropout():
    network, params = setup(dropout=0.5)
    keys = jax.random.split(jax.random.key(1), 3)
    run = lambda net, **given: np.asarray(jit(lambda p: net.denoise(p, X, SIGMA, COND, **given))(params))
    exact, dropped = run(network), run(network, dropout_keys=keys)
    half = run(setup(dropout=0.5, dtype="bfloat16")[0])
    assert half.dtype == np.float32 and 1e-5 < tiny.difference(half, exact) < 0.03
    assert tiny.difference(dropped, exact) > 0.02
    np.testing.assert_array_equal(run(setup(dropout=0.5, remat="blocks")[0], dropout_keys=keys), dropped)
    alone = jit(lambda p: network.denoise(p, X[1:2], SIGMA[1:2], Cond(COND.class_labels[1:2]), dropout_keys=keys[1:2]))(params)
    np.testing.assert_allclose(alone[0], dropped[1], atol=1e-6)


def test_files(tmp_path):
    network, params = setup()
    weights.save_directory(tmp_path / "dir", params, network.spec)
    weights.save_file(tmp_path / "one.safetensors", params, network.spec, {"sigma_init": 2.0})
    for path in (tmp_path / "dir", tmp_path / "one.safetensors"):
        loaded = load.load(path)
        assert loaded.network.spec == network.spec
        assert tiny.difference(loaded.params, params) == 0
    assert not networks.differences(network.spec, {**SPEC, "num_blocks": 2, "dropout": 0.3})


def test_a_discriminator_on_the_hidden_layer():
    """DMD2's head where the map is one pixel: a layer, a normalisation, a logit."""
    network, params = setup()
    made = Discriminator(network)
    assert made.num_params() == (16 * 16 + 16) + 2 * 16 + (16 + 1)
    heads = tiny.random_params(made.shapes())
    logits = jit(lambda h: made.bind(params, h)(X, SIGMA, COND))(heads)
    assert logits.shape == (3, 1) and np.std(logits) > 1e-3


@pytest.mark.slow
def test_it_learns_25_modes():
    """Denoising score matching on builtin:mixture25 for some 3,000 batches: modes of the right width and mass."""
    data = load.load("builtin:mixture25").params
    network = networks.build({**SPEC, "label_dim": 0, "model_channels": 96, "num_blocks": 4, "input_frequencies": 4, "sigma_data": 1.4})
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, 100, 3000, 6e-5)
    optimizer = optax.adam(schedule)

    @jax.jit
    def step(params, state, key):
        keys = jax.random.split(key, 3)
        x0 = gaussian_mixture.sample(data, keys[0], 1024)[:, None, None]
        sigma = jnp.exp(1.5 * jax.random.normal(keys[1], (1024,)) - 1.0)
        x = x0 + sigma[:, None, None, None] * jax.random.normal(keys[2], x0.shape)
        weight = ((sigma**2 + 1.96) / (1.4 * sigma) ** 2)[:, None, None, None]
        grads = jax.grad(lambda p: jnp.mean(weight * jnp.square(network.denoise(p, x, sigma) - x0)))(params)
        moves, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, moves), state

    params = jax.jit(network.init)(jax.random.key(0))
    state = optimizer.init(params)
    for i in range(3000):
        params, state = jax.block_until_ready(step(params, state, jax.random.fold_in(jax.random.key(1), i)))
    z = jax.random.normal(jax.random.key(2), (5000, 1, 1, 2))
    x = jax.jit(lambda p, z: samplers.sample(network.bind(p), z, Cond(), loop="scan"))(params, z)[:, 0, 0]
    modes = np.asarray(gaussian_mixture.nearest(data, x))
    counts, offsets = np.bincount(modes, minlength=25), np.asarray(x) - data["means"][modes]
    assert counts.min() > 150 and counts.max() < 250
    assert np.median(np.abs(offsets)) == pytest.approx(0.6745 * 0.05, rel=0.25)
    assert np.mean(np.linalg.norm(offsets, axis=1) > 0.25) < 0.04
