"""Stable Diffusion's autoencoder: parity with diffusers' class, gradients, size, scaling (goldens/text_to_image.npz, `rule`)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rule
from sim_jax import autoencoder, param_table
from small_transformers import COUNTS, GOLDEN, jit, nhwc, relative

SPEC = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
IMAGES, LATENTS = nhwc(rule.uniform("images", (2, 3, 16, 16))), nhwc(rule.uniform("latents", (2, 4, 8, 8)))


@pytest.fixture(scope="module")
def model():
    built = autoencoder.build(SPEC)
    shapes = {name: param_table.torch_shape(leaf.shape) for name, leaf in param_table.flatten(built.shapes()).items()}
    return built, param_table.from_torch(rule.state(shapes), built.shapes(), prefix="")


def test_encode_and_its_gradient(model):
    built, params = model
    weight = nhwc(rule.uniform("weight", (2, 4, 8, 8)))

    @jit
    def run(images):
        def loss(images):
            mean, logvar = built.posterior(params, images)
            return jnp.sum(mean * weight), (mean, logvar)
        return jax.value_and_grad(loss, has_aux=True)(images)

    (_, (mean, logvar)), grad = run(IMAGES)
    assert relative(mean, nhwc(GOLDEN["vae/mean"])) < 1e-5 and relative(logvar, nhwc(GOLDEN["vae/logvar"])) < 1e-5
    assert relative(grad, nhwc(GOLDEN["vae/grad_images"])) < 1e-5


def test_decode(model):
    """Latents of the diffusion model are scaling_factor times the autoencoder's."""
    built, params = model
    assert relative(jit(built.decode)(params, 0.18215 * LATENTS), nhwc(GOLDEN["vae/decoded"])) < 1e-5
    half = autoencoder.build(SPEC, dtype="bfloat16")
    out = jit(half.decode)(params, 0.18215 * LATENTS)
    assert out.dtype == jnp.float32 and 1e-5 < relative(out, nhwc(GOLDEN["vae/decoded"])) < 3e-2


def test_draws_from_the_posterior(model, monkeypatch):
    """Mean and spread are the posterior's, times the factor; each image's noise depends on its key alone."""
    built, params = model
    mean, logvar = np.float32([2.0, -1.0])[:, None, None, None], np.float32([-2.0, 1.0])[:, None, None, None]
    moments = tuple(np.broadcast_to(m, (2, 40, 40, 4)) for m in (mean, logvar))
    monkeypatch.setattr(autoencoder.Autoencoder, "posterior", lambda *_: moments)
    keys = jax.random.split(jax.random.key(1), 2)
    drawn = np.asarray(built.encode(params, IMAGES, keys)) / 0.18215
    assert np.abs(drawn.mean((1, 2, 3)) - mean.ravel()).max() < 0.1
    assert np.abs(drawn.std((1, 2, 3)) / np.exp(logvar.ravel() / 2) - 1).max() < 0.03
    np.testing.assert_array_equal(built.encode(params, IMAGES), np.float32(0.18215) * moments[0])
    monkeypatch.setattr(autoencoder.Autoencoder, "posterior", lambda *_: tuple(m[1:] for m in moments))
    np.testing.assert_allclose(np.asarray(built.encode(params, IMAGES[1:], keys[1:]))[0] / 0.18215, drawn[1], rtol=1e-6)


def test_number_of_parameters():
    assert autoencoder.build({}).num_params() == COUNTS["Stable Diffusion VAE"] == 83_653_863
    assert autoencoder.build({}).factor == 8


@pytest.mark.parametrize("spec, message", [
    ({"scaling_factor": 0}, "autoencoder.scaling_factor: got 0, allowed: a number above 0"),
    ({"block_out_channels": (16, 20), "norm_num_groups": 8}, "autoencoder.block_out_channels: got (16, 20), allowed: multiples of norm_"),
    ({"block_out_channels": []}, "autoencoder.block_out_channels: got (), allowed"),
    ({"latent_channels": True}, "autoencoder.latent_channels: got True, allowed: a whole number from 1"),
    ({"latents": 4}, "autoencoder.latents: unknown, allowed: block_out_channels, "),
    ({"model_type": "VQModel"}, "autoencoder.model_type: got 'VQModel', allowed: AutoencoderKL"),
])
def test_descriptions_that_nothing_can_be_built_from(spec, message):
    with pytest.raises(ValueError) as error:
        autoencoder.build(spec)
    assert str(error.value).startswith(message)


def test_images_that_do_not_fit(model):
    with pytest.raises(ValueError, match="images: got 15x16, allowed: multiples of 2"):
        model[0].posterior(model[1], IMAGES[:, :15])


@pytest.mark.slow
def test_remat_computes_the_same(model):
    built, params = model
    again = autoencoder.build(SPEC, remat="blocks")
    a, b = (jit(jax.grad(lambda z, m=m: jnp.sum(m.decode(params, z) ** 2)))(LATENTS) for m in (built, again))
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)
