"""PixArt-alpha and DiT: parity with diffusers' public classes, gradients, sizes, conditions.

goldens/text_to_image.npz comes from goldens/make_text_to_image.py (diffusers 0.35.2, torch 2.13.0, float64), for parameters and inputs of
`rule`; no number in it is trained. Its DiT has the time step's frequencies of the original code, which diffusers' class changes.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import rule
from sim_jax import networks, param_table, sharding
from sim_jax.convert import renaming
from sim_jax.diffusion import guidance
from sim_jax.models import dit, transformer
from sim_jax.types import Cond
from small_transformers import COUNTS, GOLDEN, MASK, SPECS, TEXT, denoise, jit, nhwc, relative, rows, small

STEPS = np.array([3, 440], np.float32)
SIZE = np.array([[64.0, 96.0], [128.0, 80.0]], np.float32)
X = nhwc(rule.uniform("x", (2, 4, 8, 8)))
SIGMA = np.float32([0.5, 2.5])


@pytest.fixture(scope="module", params=SPECS)
def computed(request):
    """(case, F's output, gradients of L = sum(out weight) by parameters and x)."""
    case = request.param
    network, params = small(case)
    x = nhwc(rule.uniform("x", (2, 4, 8, 12 if case == "pixart_micro" else 8)))
    weight = nhwc(rule.uniform("weight", (2, 8, 8, x.shape[2])))
    how = {} if case == "dit" else {"text": TEXT, "text_mask": MASK, **({"size": SIZE} if case == "pixart_micro" else {})}
    labels = jnp.eye(6)[jnp.array([4, 5]), :5] if case == "dit" else None  # the last one has no label

    @jit
    def run(params, x):
        def loss(params, x):
            out = network.module.apply({"params": params}, x, STEPS, labels, **how)
            return jnp.sum(out * weight), out
        (_, out), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)
        return out, *grads

    return case, *run(params, x)


def test_what_made_the_golden():
    assert json.loads(str(GOLDEN["versions"])) == {"torch": "2.13.0+cpu", "diffusers": "0.35.2"}


def test_output(computed):
    case, out, *_ = computed
    assert relative(out, nhwc(GOLDEN[f"{case}/out"])) < 1e-5


def test_gradients(computed):
    """Norm and a projection of every parameter's. The keys' biases have no effect on the output, and exactly no gradient here."""
    case, _, grads, grad_x = computed
    assert relative(grad_x, nhwc(GOLDEN[f"{case}/grad_x"])) < 1e-5
    table = renaming.to_theirs(param_table.to_torch(grads, prefix=""), rows(case))
    names = sorted({rule.once(name) for name in table})
    norms, cosines = GOLDEN[f"{case}/grad_norm"], GOLDEN[f"{case}/grad_cos"]
    assert len(names) == len(norms)
    for name, norm, cosine in zip(names, norms, cosines, strict=True):
        g = table[name].astype(np.float64).ravel()
        if name.endswith("to_k.bias"):
            assert norm < 1e-6 and not g.any()
            continue
        assert abs(np.linalg.norm(g) / norm - 1) < 1e-5, name
        assert abs(g @ np.cos(np.arange(g.size)) - cosine) < 1e-5 * norm, name


def count(**spec):
    return networks.build({"precond": "DDPMPrecond", **spec}).num_params()


def test_numbers_of_parameters():
    """Those of diffusers' class and DiT's code; the null caption (120 x 4096) is ours and PixArt's own, DiT counts its positions."""
    assert count(model_type="PixArt", img_resolution=64) - 120 * 4096 == COUNTS["PixArt-XL/2 512"] == 610_856_096
    assert count(model_type="DiT", img_resolution=32, **dit.variant("DiT-XL/2")) + 16 * 16 * 1152 == 675_129_632


@pytest.mark.slow
def test_numbers_of_parameters_of_others():
    large = count(model_type="PixArt", img_resolution=128, micro_conditions=True, interpolation_scale=2.0)
    assert large - 120 * 4096 == COUNTS["PixArt-XL/2 1024"] == 611_349_152
    for name, millions in {"DiT-S/2": 33, "DiT-B/4": 130, "DiT-L/2": 458}.items():  # as the paper's table 1 has them
        assert round(count(model_type="DiT", img_resolution=32, **dit.variant(name)) / 1e6) == millions


def test_variants():
    assert dit.variant("DiT-XL/2") == {"hidden_size": 1152, "depth": 28, "num_heads": 16, "patch_size": 2}
    with pytest.raises(ValueError, match="variant: got 'DiT-M/2', allowed: DiT-{S,B,L,XL}/{2,4,8}"):
        dit.variant("DiT-M/2")


def test_guided_denoiser():
    """In x0, and in variance-exploding form, it is the guided noise's x0 of diffusers' process: D(x_t / alpha; sigma / alpha)."""
    alpha_bar = GOLDEN["alphas_cumprod"].astype(np.float64)
    guided = guidance.classifier_free(denoise("pixart", 7), w=4.5)
    for step, wanted in zip((3, 440, 999), GOLDEN["guided"], strict=True):
        sigma = np.full(2, np.sqrt(1 / alpha_bar[step] - 1), np.float32)
        got = guided(X / np.float32(np.sqrt(alpha_bar[step])), sigma, Cond(text=TEXT, text_mask=MASK))
        assert relative(got, nhwc(wanted)) < 2e-5, step
    with pytest.raises(ValueError, match="cond.class_labels: got None, allowed: .* or text, where guidance is not 1"):
        guided(X, SIGMA, Cond())


def test_guided_by_a_null_caption_of_ones_own():
    """As for diffusers' files, which have none: any length, without a mask."""
    null = rule.uniform("null", (1, 7, 20))
    guided = guidance.classifier_free(denoise("pixart", 7), w=4.5, null_text=null)(X, SIGMA, Cond(text=TEXT, text_mask=MASK))
    with_text = denoise("pixart", 7)(X, SIGMA, Cond(text=TEXT, text_mask=MASK))
    without = denoise("pixart", 7)(X, SIGMA, Cond(text=np.tile(null, (2, 1, 1))))
    np.testing.assert_allclose(guided, without + 4.5 * (with_text - without), rtol=1e-5, atol=1e-5)


def test_levels_are_those_of_diffusers():
    """Rounding of any level to the nearest of theirs, in float32."""
    precond = networks.build(SPECS["pixart"]).precond
    table = np.sqrt(1 / GOLDEN["alphas_cumprod"].astype(np.float64) - 1)
    np.testing.assert_allclose(dict(precond.tables)["u"], np.append(table[::-1], 0), rtol=2e-4)  # theirs is a product in float32
    np.testing.assert_allclose(precond.round_sigma(jnp.float32([0.0, 2.49, 1e3])), [0, table[np.abs(table - 2.49).argmin()], table[-1]],
                               rtol=2e-4)


def test_captions_and_masks():
    run = lambda x, cond: denoise("pixart", 7)(x, SIGMA[:len(x)], cond)
    masked = run(X, Cond(text=TEXT, text_mask=MASK))
    hidden = np.where(MASK[..., None] == 1, TEXT, 9.0).astype(np.float32)
    np.testing.assert_array_equal(run(X, Cond(text=hidden, text_mask=MASK)), masked)  # what the mask hides has no effect
    short = run(X, Cond(text=TEXT[:, :3], text_mask=MASK[:, :3]))
    np.testing.assert_allclose(short[1], masked[1], rtol=1e-5, atol=1e-5)             # nor has how far captions are padded
    assert np.abs(short[0] - masked[0]).max() > 1e-2
    null = np.broadcast_to(rule.uniform("null", (7, 20)), (2, 7, 20))
    np.testing.assert_array_equal(run(X, Cond(text_mask=MASK)), run(X, Cond(text=null, text_mask=MASK)))
    np.testing.assert_array_equal(run(X, Cond()), run(X, Cond(text=null)))
    np.testing.assert_allclose(run(X, Cond()), run(X, Cond(text_mask=np.ones_like(MASK))), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(run(X[:1], Cond(text=TEXT[:1], text_mask=MASK[:1])), masked[:1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cond, message", [
    (Cond(), "cond.text: got None, allowed: \\[B,L,caption_channels\\], since the network has no null caption"),
    (Cond(text=TEXT[..., :8]), "cond.text: got shape \\(2, 7, 8\\), allowed: \\(2, 'tokens', 20\\)"),
    (Cond(text=TEXT[:1]), "cond.text: got shape \\(1, 7, 20\\)"),
    (Cond(text=TEXT, text_mask=MASK[:, :3]), "cond.text_mask: got shape \\(2, 3\\), allowed: \\(2, 7\\)"),
])
def test_conditions_that_do_not_fit(cond, message):
    network, params = small("pixart")
    with pytest.raises(ValueError, match=message):
        network.denoise(params, X, SIGMA, cond)


def test_text_for_a_network_without():
    network, params = small("dit")
    with pytest.raises(ValueError, match="cond.text: got text, allowed with DiT: None"):
        network.denoise(params, X, SIGMA, Cond(text=TEXT))


@pytest.mark.parametrize("case, key, value, message", [
    ("pixart", "hidden_size", 50, "network.hidden_size: got 50, allowed: a multiple of 4 and of num_heads = 4"),
    ("pixart_micro", "hidden_size", 64, "network.hidden_size: got 64, allowed: a multiple of 12 and of num_heads = 4"),
    ("pixart", "label_dim", 3, "network.label_dim: got 3, allowed: 0 with PixArt"),
    ("pixart", "caption_tokens", -1, "network.caption_tokens: got -1, allowed: a whole number from 0"),
    ("dit", "img_resolution", 9, "network.img_resolution: got 9, allowed: a multiple of patch_size = 2"),
    ("dit", "mlp_ratio", float("nan"), "network.mlp_ratio: got nan, allowed: a number above 0"),
    ("dit", "caption_channels", 8, "network.caption_channels: unknown"),
    ("dit", "model_channels", 8, "network.model_channels: unknown"),
    ("dit", "endpoint", 1, "network.endpoint: got 1, allowed: true or false"),
    ("dit", "precond", "EDMPrecond", "network.model_type: got 'DiT' with precond 'EDMPrecond'"),
])
def test_descriptions_that_nothing_can_be_built_from(case, key, value, message):
    with pytest.raises(ValueError) as error:
        networks.build({**SPECS[case], key: value})
    assert str(error.value).startswith(message)


def test_learn_sigma_off():
    """For networks of our own: as many output channels as the image has."""
    network = networks.build({**SPECS["pixart"], "learn_sigma": False})
    assert network.module.out_channels == 4 and network.shapes()["final_layer"]["linear"]["weight"].shape == (48, 16)


@pytest.mark.parametrize("case", ["pixart", "dit"])
def test_dropping_conditions(case):
    """With keys, each sample keeps its condition or has the null one; which, depends on its key alone."""
    network, params = small(case, 7 if case == "pixart" else 0)
    count = 8
    x, sigma, keys = np.tile(X[:1], (count, 1, 1, 1)), np.full(count, 2.5, np.float32), jax.random.split(jax.random.key(0), count)
    full = Cond(text=np.tile(TEXT[:1], (count, 1, 1))) if case == "pixart" else Cond(np.tile(np.eye(5, dtype=np.float32)[:1], (count, 1)))
    dropping = networks.build({**network.spec, "label_dropout": 0.5})
    run = jit(lambda cond, keys: dropping.denoise(params, x, sigma, cond, dropout_keys=keys))
    kept, null, mixed = run(full, None), run(Cond(), None), run(full, keys)
    which = [min((0, 1), key=lambda i: float(np.abs(mixed[n] - (kept, null)[i][n]).max())) for n in range(count)]
    assert 0 < sum(which) < count
    np.testing.assert_allclose(mixed, np.where(np.array(which)[:, None, None, None], null, kept), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(run(full, keys[::-1]), mixed[::-1], rtol=1e-5, atol=1e-5)


def test_fresh_networks_start_as_the_paper_says():
    """DiT is the identity of its blocks: every modulation and the output are zero; PixArt's cross-attention and output are."""
    for case in ("pixart", "dit"):
        network = networks.build({**SPECS[case], "depth": 1})
        params = jit(network.init)(jax.random.key(0))
        cond = Cond(text=TEXT) if case == "pixart" else Cond()
        np.testing.assert_array_equal(jit(lambda x: network.denoise(params, x, SIGMA, cond))(X), X)
        assert abs(float(jnp.std(params["blocks"]["0"]["mlp"]["fc1"]["weight"])) / np.sqrt(2 / (48 + 192)) - 1) < 0.05


@pytest.mark.parametrize("remat", [pytest.param("convs", marks=pytest.mark.slow), "blocks"])
def test_remat_computes_the_same(remat):
    def gradients(network, params):
        loss = lambda params, x: jnp.sum(network.denoise(params, x, SIGMA, Cond(text=TEXT, text_mask=MASK)) ** 2)
        return jit(jax.grad(loss, (0, 1)))(params, X)

    assert networks.build(SPECS["pixart"], remat=remat).module.remat == remat
    plain, again = gradients(*small("pixart")), gradients(*small("pixart", remat=remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), plain, again)


def test_bfloat16():
    """Close to float32, and islands: the output's type, modulations, the noise level's embedding."""
    cond = Cond(text=TEXT, text_mask=MASK)
    half, params = small("pixart", 7, dtype="bfloat16")
    a, b = denoise("pixart", 7)(X, SIGMA, cond), jit(half.denoise)(params, X, SIGMA, cond)
    assert b.dtype == jnp.float32 and 1e-5 < relative(b, a) < 2e-2
    assert transformer.modulate(jnp.ones((1, 2, 4), jnp.bfloat16), jnp.zeros((1, 1, 4)), jnp.zeros((1, 1, 4))).dtype == jnp.bfloat16


@pytest.mark.parametrize("case", ["pixart", pytest.param("dit", marks=pytest.mark.slow)])
def test_cut_over_devices(case):
    """FSDP with parameters gathered by each layer, the tables and the null caption among them: the same output and gradients."""
    network, params = small(case, 7 if case == "pixart" else 0)
    mesh = sharding.make_mesh("data:4", devices=jax.devices()[:4])
    where = sharding.tree_shardings(params, mesh, [(".*", "fsdp")])
    late = dataclasses.replace(network, gather=sharding.gather_at_use(where))
    captions, labels = Cond(text=np.tile(TEXT, (2, 1, 1)), text_mask=np.tile(MASK, (2, 1))), Cond(np.eye(5, dtype=np.float32)[:4])
    cond = captions if case == "pixart" else labels
    x, sigma = np.tile(X, (2, 1, 1, 1)), np.tile(SIGMA, 2)

    def gradients(network):
        loss = lambda params, x, cond: jnp.sum(network.denoise(params, x, sigma, cond) ** 2)
        return jit(jax.grad(loss, (0, 1)))

    wanted = gradients(network)(params, x, cond)
    batch = sharding.Layout(mesh).batch
    got = gradients(late)(sharding.place(params, where), *jax.tree.map(lambda a: jax.device_put(a, batch), (x, cond)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), sharding.to_host(got), wanted)
    cut = {name: leaf.sharding.spec for name, leaf in param_table.flatten(got[0]).items()}
    assert cut["blocks.0.attn.qkv.weight"] != P() and any(spec != P() for spec in cut.values())
