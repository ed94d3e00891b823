"""EDM2's magnitude-preserving U-Net: parity with the public PyTorch code, magnitudes, forced weight normalisation, names.

`goldens/edm2_small.npz` holds facts about NVlabs/edm2 at 4bf8162 (`training/networks_edm2.py`, class `Precond`), run on the CPU in
float32 with PyTorch 2.13 and random weights: none is trained, none of that code is in here. Two networks: `latent_cond` (4 channels,
5 classes, otherwise nearly the defaults) and `pixel_uncond` (every argument away from its default, clipping in effect). Weights were
drawn normal, every output channel scaled by a uniform number from 0.5 to 1.5, gains uniform from 0.3 to 0.8, all rounded to float16.
Per network: `config_json`, `param/<name>`, `x`, `sigma`, `class_labels` (the last row empty), `weight`. Per mode, `eval` and `train`
(which first forces weights to magnitude one): `denoised`, `logvar`, and for L = sum(denoised weight) + logvar . (1, -2, 3): `grad_x`,
and per parameter, in the order of sorted names, `grad_norm` and `grad_cos` = sum_i dL/dp_i cos(i). `forced_norm` and
`forced_cos` are the same two figures of the weights after the training pass. Redo it only if the architecture changes.
"""

import functools
import json
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sim_jax import experiment, networks, param_table, sharding, steps, weights
from sim_jax.convert import edm
from sim_jax.convert import edm2 as convert
from sim_jax.models import edm2
from sim_jax.types import Cond

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from configs import common  # noqa: E402

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "edm2_small.npz"
TOLERANCE = 2e-5
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiling is what takes the time here
TINY = {"precond": "Precond", "img_resolution": 8, "img_channels": 4, "label_dim": 3, "model_channels": 8, "channel_mult": (1,),
        "num_blocks": 1, "attn_resolutions": (8,), "channels_per_head": 4}


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def nhwc(x):
    return np.asarray(x, np.float32).transpose(0, 2, 3, 1)


def rms(x, axes=None):
    return np.sqrt(np.mean(np.square(np.asarray(x, np.float64)), axes))


def magnitudes(params):
    """Root mean squares of every output channel of every weight, in one array."""
    table = param_table.flatten(params)
    return np.concatenate([rms(w, tuple(range(w.ndim - 1))) for name, w in table.items() if name.endswith("weight")])


@pytest.fixture(scope="module", params=["latent_cond", "pixel_uncond"])
def golden(request):
    with np.load(GOLDENS) as file:
        data = {k.removeprefix(request.param + "/"): file[k] for k in file.files if k.startswith(request.param + "/")}
    config = json.loads(bytes(data["config_json"]).decode())
    state = {k.removeprefix("param/"): v for k, v in data.items() if k.startswith("param/")}
    return data, config, state, convert.load_state(state, config)[1]


@pytest.fixture(scope="module")
def differentiated(golden):
    """{mode: (params, denoised, logvar, parameter gradients, gradient of x)}."""
    data, config, _, params = golden
    network = networks.build({"precond": "Precond", **config})
    cond = Cond(data.get("class_labels"))
    sigma = jnp.asarray(data["sigma"])

    @jit
    def run(params, x):
        def loss(params, x):
            out = network.denoise(params, x, sigma, cond)
            class_labels = jnp.zeros((3, 0)) if cond.class_labels is None else cond.class_labels
            logvar = network.module.apply({"params": params}, x, jnp.log(sigma) / 4, class_labels, return_logvar=True)[1]
            return jnp.sum(out * nhwc(data["weight"])) + logvar @ jnp.array([1.0, -2.0, 3.0]), (out, logvar)

        (_, aux), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)
        return *aux, *grads

    trees = {"eval": params, "train": network.project(params)}
    return {mode: (tree, *run(tree, nhwc(data["x"]))) for mode, tree in trees.items()}


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_outputs_and_gradients(golden, differentiated, mode):
    """Gradients by norm and one projection per weight, measured against the norm, since a projection can be near zero; gains, whose
    gradients are single numbers in which terms cancel, together."""
    data = golden[0]
    _, out, logvar, grad_params, grad_x = differentiated[mode]
    assert relative(out, nhwc(data[f"{mode}/denoised"])) < TOLERANCE
    assert relative(logvar, data[f"{mode}/logvar"]) < TOLERANCE
    assert relative(grad_x, nhwc(data[f"{mode}/grad_x"])) < TOLERANCE
    grads = {k: v.astype(np.float64).ravel() for k, v in param_table.to_torch(grad_params, prefix="").items()}
    trained = sorted(k for k in grads if not k.endswith(("freqs", "phases")))
    assert len(trained) == len(data[f"{mode}/grad_norm"]) > 30
    gains = {}
    for name, norm, cosine in zip(trained, data[f"{mode}/grad_norm"], data[f"{mode}/grad_cos"], strict=True):
        grad, scale = grads[name], max(norm, 1e-6)
        if name.endswith("gain"):
            gains[name] = cosine  # cos(0) = 1: the gradient itself
            continue
        assert abs(np.linalg.norm(grad) - norm) / scale < TOLERANCE, name
        assert abs(grad @ np.cos(np.arange(grad.size)) - cosine) / (scale * math.sqrt(grad.size / 2)) < TOLERANCE, name
    assert relative([grads[name][0] for name in gains], list(gains.values())) < TOLERANCE
    for name in grads.keys() - set(trained):
        assert not grads[name].any(), name  # buffers


def test_forced_weights(golden, differentiated):
    """`project` leaves what the public code's training pass leaves behind; gains and buffers untouched."""
    data, _, state, _ = golden
    table = param_table.to_torch(differentiated["train"][0], prefix="")
    trained = sorted(k for k in table if not k.endswith(("freqs", "phases")))
    for name, norm, cosine in zip(trained, data["forced_norm"], data["forced_cos"], strict=True):
        w = table[name].astype(np.float64).ravel()
        assert abs(np.linalg.norm(w) - norm) < 1e-6 * norm, name
        assert abs(w @ np.cos(np.arange(w.size)) - cosine) < 1e-6 * norm * math.sqrt(w.size), name
    for name in table:
        if not name.endswith("weight"):
            np.testing.assert_array_equal(table[name], state[name].astype(np.float32))


def test_projection():
    """Magnitude 1 - 1e-4 per output channel, its fixed point; the network's output is the same to 2e-4."""
    network = networks.build(TINY)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: np.float32(rng.standard_normal(p.shape) * rng.uniform(0.2, 5)), network.shapes())
    once = network.project(params)
    assert len(magnitudes(once)) > 100 and not np.allclose(magnitudes(params), 1, atol=0.1)
    np.testing.assert_allclose(magnitudes(once), 1 - 1e-4, atol=6e-4)  # weights were as small as 0.2
    twice = network.project(network.project(once))
    np.testing.assert_allclose(magnitudes(twice), 1 - 1e-4, atol=2e-7)
    x = rng.standard_normal((2, 8, 8, 4)).astype(np.float32)
    run = jit(lambda p: network.denoise(p, x, jnp.array([0.3, 2.0]), Cond(jnp.eye(3)[:2])))
    assert relative(run(once), run(params)) < 5e-3
    assert relative(run(twice), run(once)) < 2e-4
    plain = networks.build({"img_resolution": 8, "model_channels": 16, "channel_mult": (1,), "num_blocks": 1})
    tree = {"enc": {"weight": np.full((3, 2), 7.0, np.float32)}}
    assert plain.project(tree) is tree


def test_normalize_of_zeros_has_a_gradient():
    x = jnp.zeros((2, 4)).at[1].set(3.0)
    value, grad = jit(jax.value_and_grad(lambda a: jnp.sum(edm2.normalize(a, (-1,)) * jnp.arange(4.0)[None])))(x)
    np.testing.assert_allclose(value, 3 / 3.0001 * 6, rtol=1e-6)
    np.testing.assert_allclose(grad[0], np.arange(4.0) * 1e4, rtol=1e-6)
    np.testing.assert_allclose(grad[1], (np.arange(4.0) - 1.5) / 3, atol=1e-3)


def test_magnitude_preserving_pieces():
    """Independent inputs of magnitude one give outputs of magnitude one, whatever the balance."""
    rng = np.random.default_rng(0)
    a, b, c = (rng.standard_normal((4000, n)).astype(np.float32) for n in (64, 64, 16))
    for t in (0.0, 0.3, 0.5, 1.0):
        assert abs(rms(edm2.mp_sum(a, b, t)) - 1) < 0.01
        joined = edm2.mp_cat(a, c, t)
        assert joined.shape == (4000, 80) and abs(rms(joined) - 1) < 0.01
        # The two parts contribute (1 - t)^2 : t^2 to the sum of squares.
        share = np.sum(np.square(joined[:, 64:])) / np.sum(np.square(joined))
        assert abs(share - t**2 / ((1 - t) ** 2 + t**2)) < 0.01
    z = np.linspace(-12, 12, 200001)
    square = np.sum(np.square(np.asarray(edm2.mp_silu(jnp.asarray(z)), np.float64)) * np.exp(-(z**2) / 2)) * (z[1] - z[0])
    assert abs(math.sqrt(square / math.sqrt(2 * math.pi)) - 1) < 1e-3


def test_magnitudes_at_initialisation():
    """With normal weights and zero gains every block works at magnitude one; `init` gives such weights, and zero output."""
    network = networks.build({**TINY, "img_resolution": 16, "model_channels": 32, "channel_mult": (1, 2), "label_dim": 10,
                              "channels_per_head": 32})
    rng = np.random.default_rng(4)
    params = jax.tree.map(lambda p: np.float32(rng.standard_normal(p.shape) if p.shape else 0.0), network.shapes())
    x, sigma = rng.standard_normal((8, 16, 16, 4)).astype(np.float32), np.linspace(0.1, 3, 8, dtype=np.float32)
    class_labels = np.eye(10, dtype=np.float32)[:8]

    @jit
    def run(params):
        out, seen = network.module.apply({"params": params}, x, np.log(sigma) / 4, class_labels, capture_intermediates=True,
                                         mutable=["intermediates"])
        return out, seen["intermediates"]

    raw, seen = run(params)
    assert not np.any(raw)
    outputs = {name: rms(out) for name, out in _captured(seen).items()}
    blocks = {name: value for name, value in outputs.items() if name.split(".")[-1].startswith(("16x16_", "8x8_"))}
    assert len(blocks) == 11
    for name, value in {**blocks, "unet.emb_noise": outputs["unet.emb_noise"]}.items():
        assert 0.8 < value < 1.2, (name, value)
    tiny = networks.build(TINY)
    fresh = jit(tiny.init)(jax.random.key(3))
    np.testing.assert_allclose(magnitudes(fresh), 1 - 1e-4, atol=6e-4)
    assert not any(np.any(leaf) for name, leaf in param_table.flatten(fresh).items() if name.endswith("gain"))


def _captured(seen):
    """{module's name: output}, of modules that return one array."""
    calls = param_table.flatten(seen)
    return {name.removesuffix(".__call__"): call[0] for name, call in calls.items() if not isinstance(call[0], tuple)}


def test_dropout_remat_and_bfloat16():
    """A sample's dropout depends on its key alone; recomputing changes nothing; bfloat16 is close."""
    params = _random(networks.build(TINY))
    x, labels_ = np.random.default_rng(0).standard_normal((4, 8, 8, 4)).astype(np.float32), np.eye(3, dtype=np.float32)[[0, 1, 2, 0]]

    def run(rows, keys=None, **changes):
        network = networks.build({**TINY, "dropout": 0.5}, **changes)
        return jit(network.denoise)(params, x[rows], np.full(len(rows), 0.5, np.float32), Cond(labels_[rows]), dropout_keys=keys)

    keys = jax.random.split(jax.random.key(1), 4)
    plain, dropped, alone = run([0, 1, 2, 3]), run([0, 1, 2, 3], keys), run([2], keys[2:3])
    assert relative(dropped, plain) > 0.01
    np.testing.assert_allclose(alone, dropped[2:3], atol=1e-5)
    np.testing.assert_allclose(run([0, 1, 2, 3], keys, remat="blocks"), dropped, atol=1e-5)
    half = run([0, 1, 2, 3], dtype="bfloat16")
    assert half.dtype == np.float32 and 1e-4 < relative(half, plain) < 0.02


def _random(network, seed=0):
    """As `init`, but with gains that are not zero."""
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda p: np.float32(rng.standard_normal(p.shape) if p.shape else rng.uniform(0.3, 1.0)), network.shapes())
    return network.project(params)


@pytest.mark.parametrize("size,channels,count", [
    ("XS", 128, 124_713_253), ("M", 256, 497_807_781), ("XXL", 448, 1_523_164_773)])
def test_published_sizes(size, channels, count):
    """The paper's ImageNet-512 networks have 125M, 498M and 1.5B parameters; the counts are those of the public code's modules."""
    network = networks.build({"precond": "Precond", "img_resolution": 64, "img_channels": 4, "label_dim": 1000, "model_channels": channels})
    assert network.num_params() == count


def test_round_trip_of_names(golden, tmp_path):
    """Back to PyTorch's names and layout bit for bit, through memory and through a teacher directory."""
    _, config, state, params = golden
    back = param_table.to_torch(params, prefix="")
    assert back.keys() == state.keys()
    spec = networks.full_spec(config)
    weights.save_directory(tmp_path / "teacher", params, spec, dtype="float16")
    network, loaded, header = weights.load(str(tmp_path / "teacher"))
    assert network.spec == spec and header["network"]["model_type"] == "EDM2UNet"
    again = param_table.to_torch(loaded, prefix="")
    for name, array in state.items():
        np.testing.assert_array_equal(back[name], array)
        np.testing.assert_array_equal(again[name], array)


def test_wrong_names_are_listed(golden):
    _, config, state, _ = golden
    broken = dict(state)
    broken["unet.enc.8x8_block7.conv_res0.weight"] = broken.pop("unet.enc.8x8_block0.conv_res0.weight")
    del broken["unet.emb_fourier.phases"]
    broken["unet.out_gain"] = np.zeros((1,), np.float32)
    with pytest.raises(ValueError) as error:
        convert.load_state(broken, config)
    for name in ("missing: unet.emb_fourier.phases, unet.enc.8x8_block0.conv_res0.weight", "unused: unet.enc.8x8_block7.conv_res0.weight",
                 "unet.out_gain has shape (1,), expected ()"):
        assert name in str(error.value)
    network = networks.build({"img_resolution": 8, "channel_mult": (1,)})
    with pytest.raises(ValueError, match="got 'EDMPrecond', allowed for EDM2: Precond"):
        convert.params_from_state(state, network)


def test_an_edm_network_does_not_take_edm2_names(golden):
    with pytest.raises(ValueError, match="unused: logvar_fourier.freqs, logvar_fourier.phases"):
        edm.load_state(golden[2], {"precond": "EDMPrecond", "img_resolution": 8, "channel_mult": (1,), "model_channels": 16})


def test_descriptions():
    """Each family has its own arguments and defaults, and names do not mix."""
    spec = networks.full_spec(TINY)
    assert spec["model_type"] == "EDM2UNet" and spec["use_fp16"] and spec["res_balance"] == 0.3 and "label_dropout" not in spec
    assert networks.full_spec({"model_type": "EDM2UNet", "img_resolution": 8})["precond"] == "Precond"
    assert networks.full_spec({"img_resolution": 8})["model_type"] == "DhariwalUNet"
    assert not networks.differences(TINY, {**TINY, "sigma_data": 0.5, "dropout": 0.1, "model_type": "EDM2UNet"})
    assert not networks.differences(TINY, {**TINY, "channel_mult_emb": 1, "channel_mult_noise": 1})
    assert networks.differences(TINY, {**TINY, "sigma_data": 0.7}) == ["sigma_data: 0.5 != 0.7"]
    for change, message in (
            ({"model_type": "SongUNet"}, "network.model_type: got 'SongUNet' with precond 'Precond', allowed: EDM2UNet"),
            ({"model_type": "UNet"}, "network.model_type: got 'UNet', allowed: DhariwalUNet, SongUNet, MLP, EDM2UNet, DiT, PixArt, GaussianMixture"),
            ({"precond": "EDM2"}, "network.precond: got 'EDM2', allowed: EDMPrecond, .*, Precond"),
            ({"augment_dim": 9}, "network.augment_dim: unknown"), ({"res_balnce": 0.1}, "did you mean 'res_balance'"),
            ({"label_balance": 1.5}, "network.label_balance: got 1.5, allowed: from 0 to 1"),
            ({"channels_per_head": 0}, "network.channels_per_head: got 0, allowed: a whole number from 1")):
        with pytest.raises(ValueError, match=message):
            networks.build({**TINY, **change})


def test_distillation_keeps_weights_at_magnitude_one(tmp_path):
    """SIM from a teacher directory: copies start, move and stay at magnitude one, averages start there; buffers never move."""
    rng = np.random.default_rng(1)
    teacher = jax.tree.map(lambda p: np.float32(rng.uniform(0.5, 2) * rng.standard_normal(p.shape)), networks.build(TINY).shapes())
    weights.save_directory(tmp_path / "teacher", teacher, networks.full_spec(TINY))
    config = common.get_config("sim")
    config.network = common.replace(config.network, TINY)
    config.teacher.path = str(tmp_path / "teacher")
    config.batch_size = 4
    for section in (config.generator, config.fake_score):
        section.optimizer.lr = 0.05
    built = experiment.build(config, devices=jax.devices()[:1])
    state = experiment.initial_state(built)
    roles = (state.generator.params, state.fake_score.params, state.generator.ema["ema_500k"])
    for params in roles:
        np.testing.assert_allclose(magnitudes(params), 1, atol=6e-4)
    params = sharding.place(built.teacher.params, built.teacher_shardings)
    before = jax.device_get(param_table.flatten(built.teacher.network.project(params)))

    step = jit(lambda state, key: steps.train_step(built.recipe, state, params, key))
    for _ in range(2):
        state, metrics = step(state, jax.random.key(0))
    assert all(np.isfinite(float(v)) for v in metrics.values())
    for trained in (state.generator, state.fake_score):
        # Adam moves every number by about lr: without the projection magnitudes would be off by lr^2 / 2 = 1e-3 and more.
        np.testing.assert_allclose(magnitudes(trained.params), 1 - 1e-4, atol=5e-5)
        after = jax.device_get(param_table.flatten(trained.params))
        moved = {name for name in before if relative(after[name], before[name]) > 1e-3}
        still = {name for name in before if np.array_equal(after[name], before[name])}
        assert {"unet.out_gain", "unet.enc.8x8_conv.weight", "unet.dec.8x8_in0.attn_qkv.weight", "unet.emb_label.weight"} <= moved
        assert {"unet.emb_fourier.freqs", "unet.emb_fourier.phases", "logvar_fourier.freqs"} <= still
