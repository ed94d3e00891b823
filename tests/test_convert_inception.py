"""FID's Inception-v3 from each file that people have, written byte by byte: the same parameters, or one line and exit code 2."""

import io
import json
import pickle
import zipfile

import numpy as np
import pytest

import checkpoint_writer as writer
import inception_weights
from checkpoint_writer import Build, Call, New, Pid, dumps
from sim_jax import param_table
from sim_jax.convert import __main__ as command
from sim_jax.convert import inception as converter
from sim_jax.convert import kinds
from sim_jax.evals import inception

SHAPES = converter.pytorch_shapes()
DETECTOR = converter.detector_names()
STATE = {name: array.astype(np.float16) for name, array in inception_weights.state(SHAPES, scales=False).items()}
THEIRS = {theirs: STATE[ours] for theirs, ours in DETECTOR.items()}
POOL = {"kernel_size": 3, "stride": 2, "padding": 0}
SYSTEM = Call("posix.system", ("touch executed",))
ONE = np.ones(4, np.float32)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """And nothing of 100 MB is left behind."""
    monkeypatch.chdir(tmp_path)
    yield
    for file in tmp_path.rglob("*"):
        if file.is_file():
            file.unlink()


def children_of(prefix, names):
    """({child: its names}, own names) below a dotted prefix."""
    rest = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    return list(dict.fromkeys(name.split(".")[0] for name in rest if "." in name)), [name for name in rest if "." not in name]


def detector(state, *, prefix="", extra=None):
    """The detector's module tree as StyleGAN3's persistence pickles it: its own classes persistent, PyTorch's by name."""
    inside, own = children_of(prefix, state)
    last = prefix.rstrip(".").rpartition(".")[2]
    fields = {"training": False, "_non_persistent_buffers_set": set(), "_buffers": Call("collections.OrderedDict"),
              "_parameters": {name: writer.tensor(writer.embedded(state[prefix + name]), state[prefix + name].shape) for name in own},
              "_modules": {child: detector(state, prefix=f"{prefix}{child}.") for child in inside}, **(extra or {})}
    if last == "layers":
        pool = Build(New("torch.nn.modules.pooling.MaxPool2d"), {**POOL, "_parameters": {}, "_modules": {}})
        fields["_modules"] = {**fields["_modules"], "pool0": pool, "pool2": Build(New("torch.nn.modules.pooling.AvgPool2d"), POOL)}
    if last == "layers" or last.startswith("tower") and "weight" not in own:
        return Build(New("torch.nn.modules.container.Sequential"), fields)
    if last == "output":
        return Build(New("torch.nn.modules.linear.Linear"), fields)
    fields |= {"stride": 1, "padding": [0, 3]} if "weight" in own else {}
    kind = "InceptionV3" if not prefix else "Conv2dLayer" if "weight" in own else "InceptionA"
    return writer.persistent(kind, {**fields, "_init_args": (), "_init_kwargs": {}})


def torchscript(state, *, root=None, **more):
    """What torch.jit.save writes: attributes of the program's objects, storages beside them, code compressed."""
    arrays = {str(i): array for i, array in enumerate(state.values())}
    keys = dict(zip(state, arrays, strict=True))

    def tensor(name):
        array = state[name]
        strides = tuple(int(np.prod(array.shape[i + 1:])) for i in range(array.ndim))
        return Call("torch._utils._rebuild_tensor_v2", (Pid(tuple(writer.storage_id(array, keys[name]).value)[:5]), 0, array.shape, strides,
                                                        False, Call("collections.OrderedDict")))

    def module(prefix):
        inside, own = children_of(prefix, state)
        fields = {"training": False, "_is_full_backward_hook": None, **{name: tensor(prefix + name) for name in own},
                  "padding": Call("torch.jit._pickle.build_intlist", ([0, 3],)), **{c: module(f"{prefix}{c}.") for c in inside}}
        return Build(New(f"__torch__.torch_utils.persistence.___torch_mangle_{len(prefix)}.Module"), fields)

    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("net/data.pkl", dumps(module("") if root is None else root))
        for key, array in arrays.items():
            archive.writestr(f"net/data/{key}", array.tobytes())
        archive.writestr("net/code/__torch__/torch_utils/persistence.py", "raise SystemExit('executed')\n" * 99, zipfile.ZIP_DEFLATED)
        archive.writestr("net/constants.pkl", dumps(()))
        for name, content in more.items():
            archive.writestr(name, content, zipfile.ZIP_DEFLATED)
    return file.getvalue()


def safetensors(state):
    header, body = {}, b""
    for name, array in state.items():
        header[name] = {"dtype": "F16", "shape": list(array.shape), "data_offsets": [len(body), len(body) + array.nbytes]}
        body += array.tobytes()
    return writer.safetensors_raw(header, body)


COUNTERS = {f"{conv.name}.bn.num_batches_tracked": np.array(1000) for conv in converter.convolutions()}
FILES = {
    "torch_save": lambda: writer.save_zip(STATE),
    "torch_save_legacy": lambda: writer.save_legacy(STATE),
    "saved_again_from_a_module": lambda: writer.save_zip({**STATE, **COUNTERS}),
    "detector_pkl": lambda: dumps(detector(THEIRS)),
    "detector_pt": lambda: torchscript(THEIRS),
    "detector_state": lambda: writer.save_zip(THEIRS),
    "safetensors": lambda: safetensors(STATE),
}


@pytest.mark.parametrize("name", FILES)
def test_every_layout_gives_the_same_parameters(name, tmp_path):
    (tmp_path / "file").write_bytes(FILES[name]())
    converted = kinds.read("inception", "file")
    assert converted.state.keys() == STATE.keys() and converted.network.num_params() == 23_885_392
    for key, array in converted.state.items():
        np.testing.assert_array_equal(array, STATE[key], err_msg=key)


def test_the_table_is_the_network():
    wanted = {name: param_table.torch_shape(leaf.shape) for name, leaf in param_table.flatten(inception.shapes()).items()}
    assert wanted == SHAPES and len(set(DETECTOR.values())) == len(DETECTOR) == 94 * 4 + 2
    assert set(SHAPES) - set(DETECTOR.values()) == {f"{conv.name}.bn.weight" for conv in converter.convolutions()}


@pytest.mark.parametrize("graph, name", [
    ("mixed_2.tower_1.conv_2", "Mixed_5d.branch3x3dbl_3"), ("mixed_6.conv", "Mixed_6d.branch1x1"),
    ("mixed_8.tower_1.conv_3", "Mixed_7a.branch7x7x3_4"), ("mixed_10.tower_mixed_conv_1", "Mixed_7c.branch3x3_2b")])
def test_names_of_the_graph(graph, name):
    """As torch-fidelity's util_convert_inception_weights.py lists them."""
    assert DETECTOR[f"layers.{graph}.var"] == f"{name}.bn.running_var"


def test_the_command(tmp_path, capsys):
    (tmp_path / "inception.pth").write_bytes(writer.save_zip(STATE))
    assert command.main(["--kind=inception", "--src=inception.pth", "--out=out"]) == 0
    assert capsys.readouterr().out == "InceptionV3, 23,885,392 parameters, for features: out\n"
    header = json.loads((tmp_path / "out" / "network.json").read_text())
    assert header["network"] == {"model_type": "InceptionV3"} and header["source"] == {"kind": "inception", "file": "inception.pth"}
    params, digest = inception.read_params("out")
    assert digest == header["hash"]
    ours = param_table.to_torch(params, prefix="")
    assert all(ours[name].dtype == np.float32 and np.array_equal(ours[name], STATE[name]) for name in STATE)


def zeros(shapes):
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


def changed(**changes):
    """All zeros, which is allowed, with names changed: None drops one."""
    state = {**zeros(SHAPES), **changes}
    return {name: array for name, array in state.items() if array is not None}


def theirs(**changes):
    return {**zeros({name: SHAPES[ours] for name, ours in DETECTOR.items()}), **changes}


WEIGHT, VAR = "Mixed_7b.branch3x3_2a.conv.weight", "Conv2d_1a_3x3.bn.running_var"


@pytest.mark.parametrize("state, message", [
    (changed(**{WEIGHT: None}), f"missing: {WEIGHT}"),
    (changed(**{"AuxLogits.fc.bias": np.zeros(1008)}), "unused: AuxLogits.fc.bias"),
    (changed(**{"fc.weight": np.zeros((1000, 2048)), "fc.bias": np.zeros(1000)}), "fc.bias has shape (1000,), expected (1008,); fc.weight"),
    (changed(**{WEIGHT: np.zeros((384, 384, 3, 1))}), f"{WEIGHT} has shape (384, 384, 3, 1), expected (384, 384, 1, 3)"),
    (changed(**{WEIGHT: np.full((384, 384, 1, 3), np.nan)}), f"not finite: {WEIGHT}"),
    (changed(**{VAR: np.full(32, -1.0)}), f"1 variances are negative: {VAR}"),
    (changed(**{VAR: np.ones(32, np.int64)}), f"{VAR} holds int64, allowed: floating point"),
    (changed(**{"Conv2d_1a_3x3.bn.num_batches_tracked": np.zeros(3)}), "unused: Conv2d_1a_3x3.bn.num_batches_tracked"),
    (theirs(**{"layers.conv.gamma": np.ones(32)}), "unused: layers.conv.gamma"),
    (theirs(**{"layers.conv.bn.num_batches_tracked": np.array(1)}), "unused: layers.conv.bn.num_batches_tracked"),
    ({}, "missing: Conv2d_1a_3x3.bn.bias, "),
    ({"layers.conv.weight": np.zeros((32, 3, 3, 3))}, "missing: layers.conv.beta, layers.conv.mean, layers.conv.var, layers.conv_1.beta, "),
])
def test_names_and_numbers_that_do_not_fit(state, message):
    with pytest.raises(ValueError) as error:
        converter.from_arrays(state, source="file")
    assert message in str(error.value) and str(error.value).startswith("file: ") and "\n" not in str(error.value)


def test_what_fits_passes():
    """Or the test above would prove nothing."""
    assert converter.from_arrays(changed(), source="file").keys() == converter.from_arrays(theirs(), source="file").keys() == SHAPES.keys()


def in_itself():
    """A TorchScript module that is its own attribute."""
    code = writer.Raw(writer._ops(New("__torch__.M")) + b"q\x00" + writer._ops({"a": writer.Raw(b"h\x00")}) + b"b")
    return torchscript({}, root=code)


HOSTILE = {
    "system": (lambda: dumps(SYSTEM), "asks for 'posix.system'"),
    "system_in_a_detector": (lambda: dumps(detector({"layers.conv.beta": ONE}, extra={"hook": SYSTEM})), "asks for 'posix.system'"),
    "system_in_a_program": (lambda: torchscript({}, root=Build(New("__torch__.M"), {"a": SYSTEM})), "asks for 'posix.system'"),
    "program_in_a_pickle": (lambda: dumps(Build(New("__torch__.M"), {})), "asks for '__torch__.M'"),
    "class_of_another_module": (lambda: dumps(Build(New("torch.nn.modules.conv.Conv2d"), {})), "asks for 'torch.nn.modules.conv.Conv2d'"),
    "program_in_itself": (in_itself, "nested deeper"),
    "program_without_attributes": (lambda: torchscript({}, root=Build(New("__torch__.M"), {"a": New("__torch__.M")})), "one without"),
    "program_of_a_list": (lambda: torchscript({}, root=[]), "holds a list, expected a state dict or a detector"),
    "compressed_storage": (lambda: torchscript({}, **{"net/data/0": bytes(99)}), "'net/data/0', which is compressed"),
    "code_that_leads_out": (lambda: torchscript({}, **{"net/code/../../../executed": b"x"}), "leads out of the archive"),
    "tensor_behind_its_storage": (lambda: dumps({"fc.bias": writer.tensor(writer.embedded(ONE), (1008,))}), "leads out of its storage"),
    "edm_network": (lambda: dumps({"ema": writer.persistent("EDMPrecond", {})}), "no state dict: ema is"),
    "a_number": (lambda: pickle.dumps(7), "holds 7, expected a state dict or a detector"),
    "a_detector_cut_off": (lambda: dumps(detector({"layers.conv.beta": ONE}))[:-9], "cut off"),
    "text": (lambda: b"<html>404</html>", "neither a pickle"),
}


def refused(arguments, capsys):
    code = command.main(["--kind=inception", "--src=file", "--out=out", *arguments])
    captured = capsys.readouterr()
    assert code == 2 and captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("name", HOSTILE)
def test_refused_in_one_line(name, tmp_path, capsys):
    make, message = HOSTILE[name]
    (tmp_path / "file").write_bytes(make())
    assert message in refused([], capsys)
    assert not (tmp_path / "out").exists() and not (tmp_path / "executed").exists()


@pytest.mark.parametrize("argument, message", [
    ("--sigma-init=2.5", "--sigma-init: got '2.5' with --kind=inception"), ("--ema=net", "--ema: got 'net'"),
    ('--network={"img_resolution": 32}', "--network: got {'img_resolution': 32}")])
def test_options_of_other_kinds(argument, message, tmp_path, capsys):
    (tmp_path / "file").write_bytes(dumps({}))
    assert message in refused([argument], capsys)


def test_others_still_refuse_programs(tmp_path, capsys):
    (tmp_path / "file").write_bytes(torchscript({}))
    assert command.main(["--kind=edm", "--src=file", "--out=out"]) == 2
    assert "is a TorchScript program" in capsys.readouterr().err
