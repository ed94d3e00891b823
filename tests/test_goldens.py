"""The networks against EDM's public PyTorch code: output, input gradient, and every parameter's gradient."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sim_jax import param_table
from sim_jax.convert import edm

NAMES = ("adm_edm_cond", "adm_iddpm_cond", "song_ddpmpp_edm_cond_augment", "song_ddpmpp_edm_uncond", "song_ddpmpp_vp_cond",
         "song_ncsnpp_edm_cond", "song_ncsnpp_ve_uncond")
TOLERANCE = 2e-5


def relative(a, b):
    return float(np.linalg.norm(np.asarray(a, np.float64) - np.asarray(b, np.float64)) / np.linalg.norm(np.asarray(b, np.float64)))


def nhwc(x):
    return np.asarray(x, np.float32).transpose(0, 2, 3, 1)


@pytest.fixture(scope="module", params=NAMES)
def golden(request, shared_dir):
    data = dict(np.load(shared_dir / "goldens" / f"{request.param}.npz"))
    config = json.loads(bytes(data["config_json"]).decode())
    state = {k.removeprefix("param/"): v.astype(np.float32) for k, v in data.items() if k.startswith("param/")}
    denoise, params = edm.load_state(state, config)

    def weighted(params, x):
        out = denoise(params, x, jnp.asarray(data["sigma"]), data.get("class_labels"), data.get("augment_labels"))
        return jnp.sum(out * nhwc(data["weight"])), out

    (_, out), (grad_params, grad_x) = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True))(
        params, nhwc(data["x"]))
    return data, config, state, params, out, grad_params, grad_x


def test_output(golden):
    data, out = golden[0], golden[4]
    assert relative(out, nhwc(data["denoised"])) < TOLERANCE


def test_input_gradient(golden):
    data, grad_x = golden[0], golden[6]
    assert relative(grad_x, nhwc(data["grad_x"])) < TOLERANCE


def test_parameter_gradients(golden):
    """Norm and one projection per parameter; the error is measured against the norm, since a projection can be near zero."""
    data, grads = golden[0], param_table.to_torch(golden[5])
    named = [k.removeprefix("grad_norm/") for k in data if k.startswith("grad_norm/")]
    assert len(named) > 50
    for name in named:
        grad, norm = grads[name].astype(np.float64).ravel(), float(data[f"grad_norm/{name}"])
        projection = grad @ np.cos(np.arange(grad.size))
        scale = max(norm, 1e-6)
        assert abs(np.linalg.norm(grad) - norm) / scale < TOLERANCE, name
        assert abs(projection - float(data[f"grad_cos/{name}"])) / (scale * np.sqrt(grad.size / 2)) < TOLERANCE, name


def test_round_trip_of_names(golden):
    """Back to PyTorch's names and layout, bit for bit."""
    _, _, state, params, *_ = golden
    back = param_table.to_torch(params)
    assert set(state) - set(back) <= {"u"}
    for name, array in back.items():
        np.testing.assert_array_equal(array, state[name])


def test_wrong_names_are_listed(golden):
    _, config, state, *_ = golden
    broken = dict(state)
    taken = broken.pop("model.map_layer0.weight")
    broken["model.map_layer7.weight"] = taken
    broken["model.map_layer1.bias"] = taken
    with pytest.raises(ValueError) as error:
        edm.load_state(broken, config)
    for name in ("model.map_layer0.weight", "model.map_layer7.weight", "model.map_layer1.bias"):
        assert name in str(error.value)
