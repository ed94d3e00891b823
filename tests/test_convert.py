"""Checkpoints of other code bases through `sim_jax.convert`, and ours out through `sim_jax.export`'s format and back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import checkpoint_writer as writer
from sim_jax import load, networks, param_table, sample, sharding, weights
from sim_jax.convert import __main__ as command
from sim_jax.convert import conversion, edm, infer, kinds
from sim_jax.types import Cond

BASE = {"img_resolution": 8, "img_channels": 3, "num_blocks": 1, "model_channels": 8, "channel_mult_emb": 2, "dropout": 0.1}
SONG = {**BASE, "model_type": "SongUNet", "precond": "EDMPrecond", "attn_resolutions": (4,), "channel_mult": (1, 2)}
NCSN = {**SONG, "embedding_type": "fourier", "encoder_type": "residual", "channel_mult_noise": 2, "resample_filter": (1, 3, 3, 1)}
SPECS = {
    "ddpmpp": {**SONG, "label_dim": 4, "augment_dim": 9},
    "ncsnpp": {**NCSN, "augment_dim": 9},
    "skip": {**SONG, "encoder_type": "skip", "decoder_type": "skip", "resample_filter": (1, 3, 3, 1)},
    "one_level": {**SONG, "channel_mult": (2,), "attn_resolutions": (), "label_dim": 4},
    "adm": {**BASE, "model_type": "DhariwalUNet", "precond": "EDMPrecond", "model_channels": 64, "channel_mult": (1, 2), "label_dim": 5,
            "attn_resolutions": (4,), "channel_mult_emb": 1},
    "vp": {**SONG, "precond": "VPPrecond", "beta_d": 19.0},
    "ve": {**NCSN, "precond": "VEPrecond"},
    "iddpm": {**BASE, "model_type": "DhariwalUNet", "precond": "iDDPMPrecond", "channel_mult": (1,), "label_dim": 2, "M": 50,
              "attn_resolutions": ()},
}


def network_and_state(name):
    """A small network, and a state in which nothing is zero, with the buffers that PyTorch keeps."""
    network = networks.build(SPECS[name])
    rng = np.random.default_rng(len(name))
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), network.shapes())
    return network, {**param_table.to_torch(params), **edm.buffers(network)}


def write(tmp_path, content, name="file"):
    path = tmp_path / name
    path.write_bytes(content)
    return str(path)


@pytest.fixture(params=SPECS)
def case(request):
    return request.param, *network_and_state(request.param)


def same(converted, network, state):
    expected = edm.without_buffers(state, network, source="test")
    assert converted.state.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(converted.state[name], array)


def test_pickle(case, tmp_path):
    """Every tensor and every argument of every architecture comes out of EDM's pickle, which was not executed."""
    _, network, state = case
    converted = kinds.read("edm", write(tmp_path, writer.edm_pickle(state, network.spec)))
    same(converted, network, state)
    assert converted.network.spec == network.spec


@pytest.mark.parametrize("save", [writer.save_zip, writer.save_legacy])
def test_bare_state_dicts(case, save, tmp_path):
    """What a state dict shows is found; the preconditioner is what it cannot show."""
    name, network, state = case
    said = {key: SPECS[name][key] for key in ("precond", "beta_d") if key in SPECS[name]}
    converted = kinds.read("edm", write(tmp_path, save(state)), conversion.Options(network=said))
    same(converted, network, state)
    assert networks.differences(converted.network.spec, network.spec) == []


def test_what_tensors_say_is_the_description(case):
    name, network, state = case
    found = infer.describe(state)
    assert infer.contradictions(networks.full_spec({**SPECS[name]}), found) == []
    for key in ("model_channels", "num_blocks", "channel_mult", "label_dim"):
        wrong = networks.full_spec({**SPECS[name], key: (3,) if key == "channel_mult" else SPECS[name].get(key, 0) + 1})
        assert any(text.startswith(key) for text in infer.contradictions(wrong, found))


def test_types_of_numbers(tmp_path):
    """Half and double precision are read as float32; integers are no weights."""
    network, state = network_and_state("ddpmpp")
    for kind in (np.float16, np.float64):
        out = tmp_path / np.dtype(kind).name
        source = write(tmp_path, writer.save_zip({name: array.astype(kind) for name, array in state.items()}))
        assert command.main(["--kind=edm", f"--src={source}", f"--out={out}"]) == 0
        _, params, _ = weights.load(str(out))
        for name, leaf in param_table.to_torch(params).items():
            assert leaf.dtype == np.float32
            np.testing.assert_allclose(leaf, state[name], rtol=1e-3, atol=1e-4)
    whole = write(tmp_path, writer.save_zip({**state, "model.map_layer0.bias": state["model.map_layer0.bias"].astype(np.int64)}))
    with pytest.raises(ValueError, match="map_layer0.bias holds int64, allowed: floating point"):
        kinds.read("edm", whole)


def test_strict_names(tmp_path):
    network, state = network_and_state("ddpmpp")
    broken = dict(state)
    broken["model.map_layer9.bias"] = broken.pop("model.map_layer1.bias")
    broken["model.map_layer1.weight"] = broken["model.map_layer1.weight"][:, :3]
    with pytest.raises(ValueError) as error:
        kinds.read("edm", write(tmp_path, writer.save_zip(broken)))
    for text in ("missing: model.map_layer1.bias", "unused: model.map_layer9.bias", "model.map_layer1.weight has shape (16, 3), expected (16, 16)"):
        assert text in str(error.value)


def test_dropout(tmp_path):
    """Recorded, or EDM's default where the pickle's arguments leave it out; a bare state dict says nothing, so none."""
    _, state = network_and_state("one_level")
    plain = {key: value for key, value in SPECS["one_level"].items() if key != "dropout"}
    for content, expected in ((writer.edm_pickle(state, {**plain, "dropout": 0.13}), 0.13), (writer.edm_pickle(state, plain), 0.10),
                              (writer.save_zip(state), 0.0)):
        assert kinds.read("edm", write(tmp_path, content)).network.spec["dropout"] == expected


def test_wrong_buffer(tmp_path):
    _, state = network_and_state("iddpm")
    with pytest.raises(ValueError, match="buffer u is not the one"):
        kinds.read("edm", write(tmp_path, writer.save_zip({**state, "u": state["u"] * 1.1})))


@pytest.mark.parametrize("module, attributes, message", [
    ("model.enc.8x8_block0.norm0", {"eps": 1e-3}, "eps=0.001 at model.enc.8x8_block0.norm0"),
    ("model.enc.8x8_block0", {"skip_scale": 1.0}, "skip_scale=1.0"),
    ("model.enc.8x8_block0", {"num_heads": 2}, "num_heads=2"),
    ("model.enc.8x8_block0.conv0", {"up": True}, "up=True"),
    ("model.map_layer0", {"class_name": "MyLinear"}, "'MyLinear' at model.map_layer0"),
    ("model", {"class_name": "MyUNet"}, "'MyUNet' as its network"),
    ("", {"class_name": "MyPrecond"}, "holds a 'MyPrecond'"),
    ("", {"sigma_data": 0.7}, "sigma_data=0.5, but has sigma_data=0.7 now"),
    ("", {"_init_kwargs": None}, "does not record"),
    ("", {"_init_kwargs": {"num_blocks": 10**9}}, "num_blocks: 1000000000, but its tensors say 1"),
    ("", {"_init_kwargs": {"channel_mult": 7}}, "network.channel_mult: got 7"),
    ("", {"_init_kwargs": {"model_channels": "x"}}, "network.model_channels: got 'x'"),
    ("", {"_init_kwargs": {"surprise": 1}}, "network.surprise: unknown"),
])
def test_source_that_was_changed(module, attributes, message, tmp_path):
    """What the embedded code would compute is not what we would: refused, naming what differs."""
    network, state = network_and_state("ddpmpp")
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in network.spec.items() if k != "precond"}
    if isinstance(attributes.get("_init_kwargs"), dict):
        attributes = {"_init_kwargs": {**plain, **attributes["_init_kwargs"]}}
    if "sigma_data" in attributes:
        attributes = {**attributes, "_init_kwargs": {**plain, "sigma_data": 0.5}}
    with pytest.raises(ValueError, match="^[^\n]*$") as error:
        kinds.read("edm", write(tmp_path, writer.edm_pickle(state, network.spec, {module: attributes})))
    assert message in str(error.value)


EDM2 = {"precond": "Precond", "model_type": "EDM2UNet", "img_resolution": 8, "img_channels": 3, "label_dim": 3, "model_channels": 8,
        "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,), "channels_per_head": 8, "logvar_channels": 4, "use_fp16": True}


@pytest.mark.parametrize("changes", [{}, {"label_dim": 0, "res_balance": 0.5, "clip_act": None, "channel_mult_noise": 2}])
def test_edm2(changes, tmp_path):
    """EDM2's pickles in float16, and its state dicts."""
    network = networks.build({**EDM2, **changes})
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32).astype(np.float16), network.shapes())
    state = param_table.to_torch(params, prefix="")
    attributes = {"unet.enc.8x8_block0": {key: changes[key] for key in ("res_balance", "clip_act") if key in changes}}
    converted = kinds.read("edm2", write(tmp_path, writer.edm_pickle(state, network.spec, attributes)))
    assert converted.network.spec == network.spec and converted.state.keys() == state.keys()
    for name, array in state.items():
        np.testing.assert_array_equal(converted.state[name], array)
    said = conversion.Options(network={"channels_per_head": 8, **changes})
    for kind, content in (("edm2", writer.save_zip(state)), ("safetensors", writer.safetensors({k: v.astype(np.float32) for k, v in state.items()}))):
        bare = kinds.read(kind, write(tmp_path, content), said)
        assert networks.differences(bare.network.spec, {**network.spec, "channel_mult_noise": bare.network.spec["channel_mult_noise"],
                                                        "channel_mult_emb": 2}) == []
    with pytest.raises(ValueError, match="res_balance=0.25 at 'unet.dec.4x4_in0'"):
        kinds.read("edm2", write(tmp_path, writer.edm_pickle(state, network.spec, {"unet.dec.4x4_in0": {"res_balance": 0.25}})))
    with pytest.raises(ValueError, match="num_blocks: 3, but its tensors say 1"):
        kinds.read("edm2", write(tmp_path, writer.edm_pickle(state, {**network.spec, "num_blocks": 3})))
    with pytest.raises(ValueError, match="EDM2's networks are kind edm2"):
        kinds.read("edm", write(tmp_path, writer.edm_pickle(state, network.spec)))


def test_limits_on_sigma_come_from_the_object(tmp_path):
    network, state = network_and_state("ddpmpp")
    content = writer.edm_pickle(state, network.spec, {"": {"sigma_min": 0.002, "sigma_max": 80.0}})
    converted = kinds.read("edm", write(tmp_path, content))
    assert (converted.network.precond.sigma_min, converted.network.precond.sigma_max) == (0.002, 80.0)


GENERATORS = {
    "sid": (lambda state, spec: writer.edm_pickle(state, spec), 2.5),
    "dmd2": (lambda state, spec: writer.save_zip(state), 80.0),
    "fastgen": (lambda state, spec: writer.save_zip(state, wrap=lambda sd: {
        "model": {"net": {}, "ema_9999": sd}, "optimizer": {"net": {"state": {}, "param_groups": [{"lr": 1e-5}]}}, "iteration": 7}), 80.0),
}


@pytest.mark.parametrize("kind", GENERATORS)
def test_generators_sample_in_one_call(kind, tmp_path, capsys):
    save, sigma = GENERATORS[kind]
    network, state = network_and_state("one_level")
    if kind == "fastgen":
        state = {**state, "model.logvar_linear.weight": np.ones((1, 8), np.float32), "model.logvar_linear.bias": np.ones(1, np.float32)}
    source, out = write(tmp_path, save(state, network.spec)), tmp_path / "generator"
    assert command.main([f"--kind={kind}", f"--src={source}", f"--out={out}"]) == 0
    assert json.loads((out / "network.json").read_text())["sigma_init"] == sigma
    assert sample.main([f"--weights={out}", "--num=2", "--batch=2", f"--out={tmp_path / 'x.npz'}"]) == 0
    assert "1 network call each" in capsys.readouterr().out
    images = np.load(tmp_path / "x.npz")["images"]

    loaded = load.load_generator(out)
    key, index = jax.random.key(0), np.arange(2)
    z, classes = loaded.sampler.latents.noise(key, jnp.asarray(index, jnp.uint32)), loaded.sampler.latents.classes_of(0, index)
    params = edm.params_from_state({k: v for k, v in state.items() if "logvar" not in k}, network)
    labels = jax.nn.one_hot(classes, network.label_dim)
    x0 = jax.jit(network.denoise)(params, sigma * z, jnp.full(2, sigma), Cond(labels))
    expected = np.clip(np.asarray(x0) * 127.5 + 128, 0, 255).astype(np.uint8)
    assert np.abs(expected.astype(int) - images.astype(int)).max() <= 1


def test_a_teacher_samples_in_35_calls(tmp_path, capsys):
    network, state = network_and_state("one_level")
    source, out = write(tmp_path, writer.edm_pickle(state, network.spec)), tmp_path / "teacher"
    assert command.main(["--kind=edm", f"--src={source}", f"--out={out}"]) == 0
    assert sample.main([f"--weights={out}", "--num=2", "--batch=2", f"--out={tmp_path / 'x.png'}"]) == 0
    assert "35 network calls each" in capsys.readouterr().out


def test_sigma_init_can_be_said(tmp_path):
    network, state = network_and_state("one_level")
    source = write(tmp_path, writer.save_zip(state))
    for text, expected in (("7.5", 7.5), ("none", None)):
        assert command.main(["--kind=dmd2", f"--src={source}", f"--out={tmp_path / text}", f"--sigma-init={text}"]) == 0
        assert weights.read_header(tmp_path / text).get("sigma_init") == expected


@pytest.mark.parametrize("flags, message", [
    (["--sigma-init=-1"], "--sigma-init: got '-1'"), (["--sigma-init=x"], "--sigma-init: got 'x'"), (["--network=[1]"], "--network: got"),
    (["--ema=ema"], "allowed only with fastgen"), (["--network={\"num_blocks\": 7}"], "num_blocks: 7, but its tensors say 1"),
    (["--network={\"precond\": \"iDDPMPrecond\"}"], "iDDPMPrecond"), (["--network={\"wdith\": 7}"], "network.wdith: unknown"),
])
def test_bad_flags(flags, message, tmp_path, capsys):
    network, state = network_and_state("one_level")
    source = write(tmp_path, writer.save_zip(state))
    assert command.main(["--kind=edm", f"--src={source}", f"--out={tmp_path / 'out'}", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_help_lists_the_kinds(capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and all(f"    {kind}" in text for kind in kinds.TABLE)


def test_fastgen_layouts(tmp_path):
    network, state = network_and_state("ddpmpp")
    flat = kinds.read("fastgen", write(tmp_path, writer.save_zip(state)))
    same(flat, network, state)
    assert "sigma_init" not in flat.info
    training = write(tmp_path, writer.save_zip(state, wrap=lambda sd: {"model": {"net": sd, "ema": {}}}))
    same(kinds.read("fastgen", training, conversion.Options(ema="net")), network, state)
    with pytest.raises(ValueError, match="has no 'ema_7', allowed: 'net', 'ema'"):
        kinds.read("fastgen", training, conversion.Options(ema="ema_7"))
    two_times = dict(state)
    two_times["model.map_layer0.weight"] = np.ones((16, 16), np.float32)
    with pytest.raises(ValueError, match="two times"):
        kinds.read("fastgen", write(tmp_path, writer.save_zip(two_times)))


def test_dmd2_guidance_is_not_the_generator(tmp_path):
    with pytest.raises(ValueError, match="pytorch_model.bin"):
        kinds.read("dmd2", write(tmp_path, writer.save_zip({"fake_unet.model.x": np.ones(1, np.float32)})))


def test_import_of_export_is_bit_exact(case, tmp_path):
    """params -> .safetensors -> convert -> params, for every architecture, with sigma_init and all that was recorded."""
    _, network, state = case
    params = edm.params_from_state(state, network)
    path, out = tmp_path / "x.safetensors", tmp_path / "again"
    weights.save_file(path, params, network.spec, {"sigma_init": 2.5, "labels": {"scheme": "uniform"}})
    assert command.main(["--kind=safetensors", f"--src={path}", f"--out={out}"]) == 0
    again, back, header = weights.load(str(out))
    assert again.spec == network.spec and header["sigma_init"] == 2.5 and header["labels"] == {"scheme": "uniform"}
    jax.tree.map(np.testing.assert_array_equal, back, params)
    direct = load.load(path)
    jax.tree.map(np.testing.assert_array_equal, direct.params, params)


def test_exported_files_are_what_edm_expects(shared_dir, tmp_path):
    """Names, shapes, layout and constructor arguments of an export against a golden of EDM's own code."""
    for path in sorted((shared_dir / "goldens").glob("[as]*_*.npz")):
        data = np.load(path)
        config = json.loads(bytes(data["config_json"]).decode())
        state = {k.removeprefix("param/"): data[k].astype(np.float32) for k in data.files if k.startswith("param/")}
        network = networks.build(config)
        weights.save_file(tmp_path / "x.safetensors", edm.params_from_state(state, network), network.spec)
        with safetensors.safe_open(tmp_path / "x.safetensors", "numpy") as file:
            spec = json.loads(file.metadata()["sim_jax"])["network"]
        exported = safetensors.numpy.load_file(tmp_path / "x.safetensors")
        filters = {name for name in exported if name.endswith(".resample_filter")}
        assert exported.keys() - filters == state.keys()
        for name, array in state.items():
            # EDM computes u in float32, by a recursion that loses digits where u is small.
            np.testing.assert_allclose(exported[name], array, rtol=1e-3 if name == "u" else 0)
        assert len(filters) >= 4 * (len(spec["channel_mult"]) - 1)
        for key, value in config.items():
            assert spec[key] == value, key
        same(kinds.read("safetensors", str(tmp_path / "x.safetensors")), network, {**state, **edm.buffers(network)})


def test_goldens_through_the_converter(shared_dir, tmp_path):
    """A golden's state as a torch file, converted and loaded, gives the golden's output."""
    data = np.load(shared_dir / "goldens" / "song_ncsnpp_edm_cond.npz")
    config = json.loads(bytes(data["config_json"]).decode())
    state = {k.removeprefix("param/"): data[k].astype(np.float32) for k in data.files if k.startswith("param/")}
    out = tmp_path / "golden"
    source = write(tmp_path, writer.edm_pickle({**state, **edm.buffers(networks.build(config))}, networks.full_spec(config)))
    assert command.main(["--kind=edm", f"--src={source}", f"--out={out}"]) == 0
    network, params, _ = weights.load(str(out))
    x, labels = data["x"].astype(np.float32).transpose(0, 2, 3, 1), data["class_labels"]
    denoised = jax.jit(network.denoise)(params, x, data["sigma"], Cond(labels))
    expected = data["denoised"].transpose(0, 2, 3, 1)
    assert np.linalg.norm(denoised - expected) < 2e-5 * np.linalg.norm(expected)


def _mapped(array):
    while isinstance(array, np.ndarray):
        array = array.base
    return isinstance(array, memoryview)


def test_sharded_loading_reads_only_what_devices_hold(tmp_path):
    """Loaded trees are views of the mapped file, and land on their devices cut as the rules say."""
    network, state = network_and_state("adm")
    weights.save_directory(tmp_path / "t", edm.params_from_state(state, network), network.spec)
    _, params, _ = weights.load(str(tmp_path / "t"))
    assert all(_mapped(leaf) for leaf in jax.tree.leaves(params))
    mesh = sharding.make_mesh("data:2,fsdp:4")
    layout = sharding.tree_shardings(params, mesh, ((".*", "fsdp"),))
    placed = sharding.place(params, layout)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b), placed, params)
    big = placed["enc"]["4x4_block0"]["conv1"]["weight"]
    assert big.addressable_shards[0].data.size == big.size // 4


def test_a_changed_byte_is_noticed(tmp_path):
    network, state = network_and_state("one_level")
    weights.save_directory(tmp_path / "t", edm.params_from_state(state, network), network.spec)
    file = tmp_path / "t" / "params.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="does not match the hash"):
        weights.load(str(tmp_path / "t"))


def test_written_files_are_plain_safetensors(tmp_path):
    """The official reader sees what we wrote, in both types."""
    network, state = network_and_state("ncsnpp")
    params = edm.params_from_state(state, network)
    for kind in ("float32", "float16"):
        weights.save_directory(tmp_path / kind, params, network.spec, dtype=kind)
        read = safetensors.numpy.load_file(tmp_path / kind / "params.safetensors")
        for name, array in edm.without_buffers(state, network, source="test").items():
            np.testing.assert_array_equal(read[name], array.astype(kind))
        assert weights.content_hash(read) == weights.read_header(tmp_path / kind)["hash"]
