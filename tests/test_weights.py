"""Weights on disk: exact, under PyTorch's names, and refusing what is damaged or foreign."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

import tiny
from sim_jax import networks, param_table, weights
from sim_jax.convert import edm

NET = tiny.network(label_dim=3, img_channels=2)
PARAMS = tiny.random_params(NET.shapes(), 5)


def save(where, **kwargs):
    """As a file or a directory, by the name."""
    write = weights.save_file if where.suffix == ".safetensors" else weights.save_directory
    write(where, PARAMS, NET.spec, {"sigma_init": 2.5, "note": "x"}, **kwargs)
    return where, where if where.is_file() else where / "params.safetensors"


@pytest.fixture(params=["teacher", "teacher.safetensors"])
def target(request, tmp_path):
    return tmp_path / request.param


def test_round_trip_is_exact(target):
    save(target)
    network, params, header = weights.load(str(target))
    assert jax.tree.structure(params) == jax.tree.structure(PARAMS)
    jax.tree.map(np.testing.assert_array_equal, params, PARAMS)
    assert network.spec == NET.spec and networks.differences(network.spec, NET.spec) == []
    assert header["sigma_init"] == 2.5 and header["note"] == "x"
    assert weights.read_header(str(target)) == header


def test_half_precision(target):
    """Half the size, values rounded to float16 once, read back as float32."""
    _, file = save(target, dtype="float16")
    assert file.stat().st_size < 2.5 * sum(a.size for a in jax.tree.leaves(PARAMS)) + 8192
    _, params, _ = weights.load(str(target))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(np.float16).astype(np.float32)), params, PARAMS)
    assert {a.dtype for a in jax.tree.leaves(params)} == {np.dtype("float32")}


def test_same_weights_same_hash(tmp_path):
    """The hash is of the content: a file and a directory agree, another value or type does not."""
    hashes = [weights.read_header(str(save(tmp_path / name)[0]))["hash"] for name in ("a", "b.safetensors")]
    assert hashes[0] == hashes[1] != weights.read_header(str(save(tmp_path / "c", dtype="float16")[0]))["hash"]
    state = {"w": np.arange(6, dtype=np.float32)}
    first = weights.content_hash(state)
    assert weights.content_hash({"w": state["w"].copy()}) == first
    for other in ({"w": state["w"].reshape(2, 3)}, {"v": state["w"]}, {"w": state["w"].view(np.int32)}, {"w": state["w"] + 1}):
        assert weights.content_hash(other) != first


@pytest.mark.parametrize("position", [-1, -4001, 0.5])
def test_flipped_bit_is_found(target, position):
    _, file = save(target)
    data = bytearray(file.read_bytes())
    data[int(position * len(data)) if isinstance(position, float) else position] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="does not match the hash") as error:
        weights.load(str(target))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("length", [0, 5, 1000, -100])
def test_truncated_file(target, length):
    _, file = save(target)
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError) as error:
        weights.load(str(target))
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_missing_and_foreign(tmp_path):
    cases = {"absent": "not found", "empty": "no network.json", "foreign.safetensors": "does not describe its network",
             "text.safetensors": "not a safetensors file", "list": "does not describe its network", "broken": "not JSON"}
    for folder in ("empty", "list", "broken"):
        (tmp_path / folder).mkdir()
    safetensors.numpy.save_file({"w": np.zeros(3)}, tmp_path / "foreign.safetensors")
    (tmp_path / "text.safetensors").write_text("no weights in here")
    (tmp_path / "list" / "network.json").write_text("[1, 2]")
    (tmp_path / "broken" / "network.json").write_text("{")
    for name, words in cases.items():
        with pytest.raises(ValueError, match=words) as error:
            weights.load(str(tmp_path / name))
        assert name in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="teacher.path: got 'builtin:nothing', allowed: "):
        weights.load("builtin:nothing")


def test_directory_without_weights(tmp_path):
    _, file = save(tmp_path / "teacher")
    file.unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        weights.load(str(tmp_path / "teacher"))


def test_metadata_that_is_not_json(tmp_path):
    file = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"w": np.zeros(3)}, file, metadata={"sim_jax": "{"})
    with pytest.raises(ValueError) as error:
        weights.load(str(file))
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_description_of_another_network(tmp_path):
    """Weights that do not fit what the directory says they are: names and shapes are listed."""
    save(tmp_path / "teacher")
    path = tmp_path / "teacher" / "network.json"
    header = json.loads(path.read_text())
    header["network"]["label_dim"] = 4
    path.write_text(json.dumps(header))
    with pytest.raises(ValueError, match=r"model.map_label.weight has shape \(16, 3\), expected \(16, 4\)"):
        weights.load(str(tmp_path / "teacher"))


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="out: got .*weights.bin.*, allowed: a name that ends in .safetensors"):
        weights.save_file(tmp_path / "weights.bin", PARAMS, NET.spec)
    with pytest.raises(ValueError, match="dtype: got 'bfloat16', allowed: float32, float16"):
        weights.save_directory(tmp_path / "w", PARAMS, NET.spec, dtype="bfloat16")
    (tmp_path / "plain").write_text("a file")
    with pytest.raises(ValueError, match="out: got"):
        weights.save_directory(tmp_path / "plain" / "w", PARAMS, NET.spec)


def test_dropout_can_be_replaced(target):
    save(target)
    assert weights.load(str(target), dropout=0.4)[0].spec["dropout"] == 0.4


def test_names_and_layouts_are_pytorchs(tmp_path, shared_dir):
    """A golden's state, through our tree and file, comes out under its own names, shapes and values,
    beside the resampling filters that EDM's code keeps as buffers and the goldens leave out."""
    data = dict(np.load(shared_dir / "goldens" / "song_ncsnpp_edm_cond.npz"))
    config = json.loads(bytes(data["config_json"]).decode())
    state = {k.removeprefix("param/"): v.astype(np.float32) for k, v in data.items() if k.startswith("param/")}
    network = networks.build(config)
    params = edm.params_from_state(state, network)
    weights.save_file(tmp_path / "golden.safetensors", params, network.spec)
    written = safetensors.numpy.load_file(tmp_path / "golden.safetensors")
    filters = {name for name in written if name.endswith(".resample_filter")}
    assert written.keys() - filters == state.keys() and "model.enc.8x8_aux_residual.resample_filter" in filters
    for name, array in state.items():
        np.testing.assert_array_equal(written[name], array)
    for name in filters:
        np.testing.assert_allclose(written[name], np.outer([1, 3, 3, 1], [1, 3, 3, 1])[None, None] / 64)


def test_layouts():
    """OIHW <-> HWIO, [out, in] <-> [in, out], vectors as they are."""
    kernel = np.arange(24).reshape(2, 3, 4, 1)
    assert param_table.to_torch_layout(kernel)[0, 2, 1, 2] == kernel[1, 2, 2, 0]
    for shape in ((2, 3, 4, 5), (3, 7), (4,)):
        array = np.random.default_rng(0).standard_normal(shape)
        np.testing.assert_array_equal(param_table.from_torch_layout(param_table.to_torch_layout(array)), array)
    tree = {"enc": {"8x8_conv": {"weight": 1, "bias": 2}}, "map": {"weight": 3}}
    assert param_table.flatten(tree) == {"enc.8x8_conv.bias": 2, "enc.8x8_conv.weight": 1, "map.weight": 3}
    assert param_table.unflatten(param_table.flatten(tree)) == tree
