"""Inception-v3 against public implementations with the same parameters, and how images are prepared for it.

goldens/inception.npz holds what torch-fidelity 0.4.0's FeatureExtractorInceptionV3, pytorch-fid 0.3.0's InceptionV3 and a
reimplementation of StyleGAN3's detector gave with torch 2.13.0 on a CPU, for the parameters and images of `inception_weights`
(the detector's with every bn.weight one). Spatial features are Mixed_6d.branch1x1's first seven channels, pixel by pixel. It stays
valid as long as the rule there does.
"""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import inception_weights
from sim_jax import param_table, weights
from sim_jax.evals import inception
from sim_jax.evals.features import open_features
from sim_jax.sharding import Layout, make_mesh

GOLDEN = np.load(pathlib.Path(__file__).parent / "goldens" / "inception.npz")
IMAGES = {"32": (2, 32, 32), "299": (1, 299, 299), "grey": (1, 28, 40, 1)}
OUTPUTS = ("features", "logits_unbiased", "logits", "spatial", "probabilities")
TF1, HALF_PIXEL = inception.CONVENTIONS["edm"], inception.CONVENTIONS["pytorch_fid"]


def relative_error(got, wanted):
    return np.abs(got - wanted).max() / np.abs(wanted).max()


def torch_shapes():
    return {name: param_table.torch_shape(leaf.shape) for name, leaf in param_table.flatten(inception.shapes()).items()}


def write(folder, **rule):
    state = inception_weights.state(torch_shapes(), **rule)
    weights.save_state_directory(folder, state, {"model_type": "InceptionV3"})
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = write(tmp_path_factory.mktemp("inception") / "weights")
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def extractors(folder):
    """By convention: two images a batch, every output."""
    return {name: inception.open_inception(folder, convention=name, outputs=OUTPUTS, batch_per_device=2)
            for name in ("torch_fidelity", "pytorch_fid")}


def test_names_and_number_of_parameters():
    """torch-fidelity counts 23,850,960 parameters, and 2 x 17,216 statistics besides."""
    names = torch_shapes()
    count = sum(int(np.prod(shape)) for shape in names.values())
    statistics = sum(int(np.prod(shape)) for name, shape in names.items() if ".running_" in name)
    assert (len(names), count, statistics) == (94 * 5 + 2, 23_885_392, 34_432) and count - statistics == 23_850_960
    assert names["Mixed_6c.branch7x7dbl_2.conv.weight"] == (160, 160, 7, 1) and names["fc.weight"] == (1008, 2048)


@pytest.mark.parametrize("key", [key for key in GOLDEN.files if "/edm/" not in key])
def test_golden(key, extractors):
    tag, convention, output = key.split("/")
    got = extractors[convention].all(inception_weights.images(*IMAGES[tag]))[output]
    assert got.dtype == np.float32 and got.shape == GOLDEN[key].shape
    assert relative_error(got, GOLDEN[key]) < 2e-5


def test_the_detector(tmp_path):
    """EDM's and StyleGAN's: its resize is written as an affine grid, its softmax is of logits without bias."""
    extract = inception.open_inception(write(tmp_path / "detector", scales=False), convention="edm", outputs=OUTPUTS, batch_per_device=2)
    got = extract.all(inception_weights.images(*IMAGES["32"]))
    assert relative_error(got["features"], GOLDEN["32/edm/features"]) < 2e-5
    assert relative_error(got["probabilities"], GOLDEN["32/edm/probabilities"]) < 1e-4
    shutil.rmtree(tmp_path / "detector")


def test_an_image_alone_and_among_others(extractors):
    images = inception_weights.images(3, 32, 32)
    together = extractors["torch_fidelity"].all(images)
    for i in range(3):
        alone = extractors["torch_fidelity"].all(images[i:i + 1])
        for name in OUTPUTS:
            assert together[name].shape[0] == 3
            np.testing.assert_allclose(alone[name][0], together[name][i], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(together["probabilities"], jax.nn.softmax(together["logits_unbiased"]), rtol=1e-5)


def test_opened_by_directory(folder):
    extract = open_features(folder)
    assert extract.outputs == ("features", "probabilities", "spatial") and extract.image_shape == (None, None, None)
    recorded = json.loads((folder / "network.json").read_text())["hash"]
    assert extract.identifier == f"inception-2015-12-05-tf1:{recorded[:12]}"
    other = inception.open_inception(folder, convention="pytorch_fid", dtype="bfloat16")
    assert other.identifier == f"inception-2015-12-05-half_pixel-bfloat16:{recorded[:12]}"


@pytest.mark.slow
def test_cut_over_devices(folder):
    layout = Layout(make_mesh(devices=jax.devices()[:4]))
    extract = inception.open_inception(folder, convention="torch_fidelity", outputs=OUTPUTS[:4], layout=layout, batch_per_device=1)
    images = np.concatenate([inception_weights.images(*IMAGES["32"])] * 3)[:5]
    for name, array in extract.all(images).items():
        assert relative_error(array, GOLDEN[f"32/torch_fidelity/{name}"][[0, 1, 0, 1, 0]]) < 2e-5


@pytest.mark.slow
def test_bfloat16_is_close_and_not_the_same(folder):
    extract = inception.open_inception(folder, dtype="bfloat16", outputs=OUTPUTS[:4], batch_per_device=2)
    for name, array in extract.all(inception_weights.images(*IMAGES["32"])).items():
        assert array.dtype == np.float32
        assert 1e-4 < relative_error(array, GOLDEN[f"32/torch_fidelity/{name}"]) < 3e-2


@pytest.mark.parametrize("convention", [TF1, HALF_PIXEL])
@pytest.mark.parametrize("width", [1, 2, 32, 299, 640])
def test_resize_of_a_ramp_shows_where_the_taps_lie(convention, width):
    """Interpolating x -> x gives back each output pixel's position, repeated beyond the last pixel."""
    ramp = np.linspace(0, 255, width).round().astype(np.uint8)[None, None, :, None]
    values = np.asarray(inception.prepare(jnp.asarray(ramp), convention))[0, 0, :, 0] * convention.scale + convention.offset
    i = np.arange(299)
    at = (i + 0.5) * width / 299 - 0.5 if convention is HALF_PIXEL else i * width / 299
    wanted = np.interp(np.clip(at, 0, width - 1), np.arange(width), ramp[0, 0, :, 0].astype(np.float64))
    np.testing.assert_allclose(values, wanted, atol=0.02)


def test_resize_treats_rows_as_columns():
    image = inception_weights.images(1, 20, 50)
    upright = inception.prepare(jnp.asarray(image.transpose(0, 2, 1, 3)), TF1)
    np.testing.assert_allclose(inception.prepare(jnp.asarray(image), TF1), jnp.swapaxes(upright, 1, 2), atol=1e-6)


@pytest.mark.parametrize("convention, wanted", [("edm", [-1, 0, 127 / 128]), ("pytorch_fid", [-1, 128 / 127.5 - 1, 1])])
def test_range_and_grey(convention, wanted):
    for value, want in zip((0, 128, 255), wanted, strict=True):
        grey = np.full((1, 5, 7, 1), value, np.uint8)
        out = np.asarray(inception.prepare(jnp.asarray(grey), inception.CONVENTIONS[convention]))
        assert out.shape == (1, 299, 299, 3) and np.allclose(out, want, atol=1e-6)


def test_the_four_corner_conventions_are_one():
    assert {name for name, convention in inception.CONVENTIONS.items() if convention == TF1} == {"edm", "stylegan", "torch_fidelity", "adm"}


def test_pools_leave_a_constant_alone():
    """Zeros in the padding would darken the border of an average, and brighten a maximum of negative numbers."""
    from sim_jax.models import inception as model

    x = jnp.full((1, 5, 5, 2), -3.0)
    assert jnp.all(model._average_pool(x) == x) and jnp.all(model._still_max_pool(x) == x)


@pytest.mark.parametrize("given, message", [
    ({"convention": "clean_fid"}, "convention: got 'clean_fid', allowed: edm, stylegan, torch_fidelity, adm, pytorch_fid"),
    ({"dtype": "float16"}, "dtype: got 'float16', allowed: float32, bfloat16"),
    ({"outputs": ("features", "pool")}, "outputs: got 'pool', allowed: features, probabilities, spatial, logits, logits_unbiased"),
])
def test_unknown_words(given, message, folder):
    with pytest.raises(ValueError) as error:
        inception.open_inception(folder, **given)
    assert str(error.value) == message


def test_images_that_do_not_fit(extractors):
    extract = extractors["torch_fidelity"]
    for images in (np.zeros((1, 8, 8, 3), np.float32), np.zeros((0, 8, 8, 3), np.uint8), np.zeros((8, 8, 3), np.uint8)):
        with pytest.raises(ValueError, match="images: got .* allowed: uint8"):
            extract.all(images)
    with pytest.raises(ValueError, match="images: got 2 channels, allowed: 1 or 3"):
        extract.all(np.zeros((1, 8, 8, 2), np.uint8))


def test_directories_that_do_not_fit(folder, tmp_path):
    def refused(path, message):
        with pytest.raises(ValueError, match=message) as error:
            inception.open_inception(path)
        assert "\n" not in str(error.value)

    refused(tmp_path / "nothing", "no network.json")
    other = tmp_path / "other"
    other.mkdir()
    (other / "network.json").write_text("[" * 10_000)
    refused(other, "no network.json")
    (other / "network.json").write_text(json.dumps({"network": {"model_type": "SongUNet"}, "hash": ""}))
    refused(other, "holds a 'SongUNet', allowed: InceptionV3")
    shutil.copy(folder / "network.json", other)
    refused(other, "cannot be read")
    content = bytearray((folder / "params.safetensors").read_bytes())
    content[-1] ^= 1
    (other / "params.safetensors").write_bytes(content)
    refused(other, "the file is damaged or was exchanged")
    (other / "params.safetensors").unlink()
    weights.save_state_directory(other, {"fc.weight": np.zeros((1000, 2048), np.float32)}, {"model_type": "InceptionV3"})
    refused(other, "missing: .* and 463 more; fc.weight has shape \\(1000, 2048\\), expected \\(1008, 2048\\)")
