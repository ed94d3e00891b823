"""Files made to harm: none runs anything, allocates without bound or hangs; each gives one clear line and exit code 2."""

import json
import os
import pathlib
import pickle
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile

import jax
import numpy as np
import pytest

import checkpoint_writer as writer
from checkpoint_writer import Build, Call, Name, New, Pid, Raw, dumps
from sim_jax import networks, param_table
from sim_jax.convert import __main__ as command
from sim_jax.convert import edm

SPEC = networks.full_spec({"img_resolution": 4, "img_channels": 1, "model_type": "SongUNet", "model_channels": 4, "num_blocks": 1,
                           "channel_mult": (1,), "attn_resolutions": (), "channel_mult_emb": 1})
ROOT = pathlib.Path(__file__).resolve().parents[1]
ONE = np.ones(4, np.float32)
COMMAND = "touch executed"


def honest() -> dict[str, np.ndarray]:
    network = networks.build(SPEC)
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), network.shapes())
    return {**param_table.to_torch(params), **edm.buffers(network)}


STATE = honest()
SOME = "model.map_layer0.weight"


def pkl(value):
    return lambda: dumps(value)


def in_ema(value):
    """Somewhere deep inside of a file that is otherwise in order."""
    return lambda: writer.edm_pickle(STATE, SPEC, {"model.map_layer0": {"extra": value}})


def with_tensor(tensor):
    return lambda: writer.edm_pickle(STATE, SPEC, tensors={SOME: tensor})


def laughs():
    """2^60 paths through 60 lists."""
    return b"\x80\x04" + b"]q\x00" + b"".join(b"0](h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1]) for i in range(60)) + b"."


def module_laughs():
    """2^60 modules, by references to 60."""
    code = b""
    for i in range(60):
        children = {"a": Raw(b"h" + bytes([i - 1])), "b": Raw(b"h" + bytes([i - 1]))} if i else {}
        code += writer._ops(writer.persistent("UNetBlock", {"_modules": children})) + b"q" + bytes([i])
    return b"\x80\x04" + writer._ops("ema") + b"0(" + code + b"1}(" + writer._ops("ema") + b"h;u."


def module_in_itself():
    """A container whose child is the container."""
    container = Build(New("torch.nn.modules.container.ModuleDict"), Raw(b"q\x00" + writer._ops({"_modules": {"model": Raw(b"h\x00")}})))
    return dumps({"ema": container})


def deep_key():
    """A tuple of tuples of ... as a key: hashing it would walk 2^60 paths."""
    return b"\x80\x04}" + b")q\x00" + b"".join(b"0h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(60)) + b"Ns."


def zip_with(data=None, **more):
    members = {"a/data.pkl": data or dumps({SOME: writer.tensor(writer.storage_id(ONE), (4,))}), "a/data/0": ONE.tobytes(), **more}
    return writer.zip_file(members)


def edited(content, old, new):
    assert old in content
    return content.replace(old, new)


def overlapping_zip():
    """The directory's second entry points at the first member."""
    content = bytearray(writer.zip_file({"a/data.pkl": dumps({}), "a/data.pkx": dumps({})}))
    directory = content.rindex(b"PK\x01\x02")
    content[directory + 42:directory + 46] = bytes(4)
    second = content.rindex(b"a/data.pkx")
    content[second:second + 10] = b"a/data.pkl"
    return bytes(content)


def encrypted_zip():
    content = bytearray(zip_with())
    directory = content.index(b"PK\x01\x02")
    content[directory + 8] |= 1
    return bytes(content)


def duplicate_zip():
    content = writer.zip_file({"a/data.pkl": dumps({}), "a/data.pkx": dumps({})})
    return content.replace(b"a/data.pkx", b"a/data.pkl")


def nans():
    return writer.edm_pickle({**STATE, SOME: np.full_like(STATE[SOME], np.nan)}, SPEC)


def renamed(old, new):
    return {name.replace(old, new): array for name, array in STATE.items()}


def kwargs(**changes):
    plain = {key: list(v) if isinstance(v, tuple) else v for key, v in SPEC.items() if key != "precond"}
    return lambda: writer.edm_pickle(STATE, SPEC, {"": {"_init_kwargs": {**plain, **changes}}})


def legacy(value, arrays=None, **more):
    return lambda: writer.legacy(value, arrays or {"0": ONE}, **more)


def header(entry, body=bytes(16)):
    return lambda: writer.safetensors_raw({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "b": entry}, body)


EDM = lambda: writer.edm_pickle(STATE, SPEC)  # noqa: E731
STORED = writer.embedded(STATE[SOME].astype(np.float32))
SYSTEM = Call("posix.system", (COMMAND,))
HUGE = 1 << 46

FILES = {
    # code
    "os_system": (pkl(SYSTEM), "asks for 'posix.system'"),
    "nested_eval": (in_ema(Call("builtins.eval", ("__import__('os').system('touch executed')",))), "asks for 'builtins.eval'"),
    "exec_as_class": (in_ema(New("subprocess.Popen", (["touch", "executed"],))), "asks for 'subprocess.Popen'"),
    "copyreg_reconstructor": (pkl(Call("copyreg._reconstructor", (Name("builtins.object"),))), "asks for 'copyreg._reconstructor'"),
    "copyreg_newobj": (pkl(Call("copyreg.__newobj__", (1,))), "asks for 'copyreg.__newobj__'"),
    "extension_code": (pkl(Raw(b"\x82\x01")), "operation '\\x82'"),
    "inst": (pkl(Raw(b"(X\x0e\x00\x00\x00touch executediposix\nsystem\n")), "operation 'i'"),
    "obj": (pkl(Raw(b"(cposix\nsystem\no")), "asks for 'posix.system'"),
    "getattr": (pkl(Call("builtins.getattr", (Name("torch.FloatStorage"), "__init__"))), "asks for 'builtins.getattr'"),
    "partial": (pkl(Call("functools.partial", (1,))), "asks for 'functools.partial'"),
    "dotted_name": (pkl(Raw(writer._ops("torch") + writer._ops("os.system") + b"\x93")), "asks for 'torch.os.system'"),
    "import_of_torch": (pkl(Call("torch.load", ("x",))), "asks for 'torch.load'"),
    "hub": (in_ema(Call("torch.hub.load", ("evil/repo", "x"))), "asks for 'torch.hub.load'"),
    "code_in_a_storage": (with_tensor(writer.tensor(Call("torch.storage._load_from_bytes", (writer.legacy(SYSTEM, {}),)), (4, 4))),
                          "asks for 'posix.system'"),
    "code_in_the_system_info": (lambda: dumps(writer.MAGIC) + dumps(1001) + dumps(SYSTEM), "asks for 'posix.system'"),
    "storage_in_a_storage": (pkl({"a": Call("torch.storage._load_from_bytes", (writer.legacy(STORED, {}),))}), "asks for"),
    "call_of_a_storage_type": (pkl(Call("torch.FloatStorage", (10**12,))), "may only be named"),
    "call_of_a_number": (pkl(Raw(b"K\x01)R")), "calls a int"),
    "persistent_id": (pkl(Pid(("storage", Name("torch.FloatStorage"), "0", "cpu", 4, None))), "persistent id"),
    "build_of_a_name": (pkl(Build(Name("collections.OrderedDict"), {"x": 1})), "sets the state of"),
    "codec": (pkl(Call("_codecs.encode", ("x", "rot13"))), "_codecs.encode"),
    "protocol_0": (lambda: b"cposix\nsystem\n(S'touch executed'\ntR.", "neither a pickle"),
    "old_torch_tar": (lambda: b"storages" + bytes(1024), "neither a pickle"),
    "zip_with_code": (lambda: zip_with(dumps(SYSTEM)), "asks for 'posix.system'"),
    "torchscript": (lambda: zip_with(**{"a/constants.pkl": b"x"}), "TorchScript"),
    # memory and time
    "memo_far_away": (pkl(Raw(b"}r\xff\xff\xff\xff")), "not named as in EDM"),
    "memo_missing": (pkl(Raw(b"h\x07")), "memo entry 7 does not exist"),
    "memo_of_a_mark": (pkl(Raw(b"(q\x00N")), "remembers a mark"),
    "billion_laughs": (laughs, "holds a list"),
    "module_laughs": (module_laughs, "more than 20000 modules, or modules nested deeper"),
    "module_in_itself": (module_in_itself, "nested deeper"),
    "deep_key": (deep_key, "uses a tuple as a key"),
    "integer_bomb": (pkl(Raw(b"\x8b\xff\xff\xff\x7f")), "integer of 2147483647 bytes"),
    "bytes_of_an_exabyte": (pkl(Raw(b"\x8e" + struct.pack("<Q", 1 << 60))), "is cut off"),
    "text_of_4_gigabytes": (pkl(Raw(b"X\xff\xff\xff\xff")), "is cut off"),
    "frame_of_an_exabyte": (pkl(Raw(b"\x95" + struct.pack("<Q", 1 << 60))), "a frame is longer than the file"),
    "millions_of_operations": (lambda: b"\x80\x04" + b"N0" * 1_500_000 + b"N.", "more pickle operations"),
    "copies_of_a_set": (pkl(Raw(b"](" + writer._ops("a") * 3000 + b"eq\x00" + (writer._name("builtins.set") + b"h\x00\x85R0") * 3000)),
                        "more pickle operations"),
    "nested_lists": (lambda: b"\x80\x04" + b"]" * 300_000 + b"a" * 299_999 + b".", "holds a list"),
    "storage_announces_too_much": (legacy({SOME: writer.tensor(writer.storage_id(ONE, count=1 << 40), (4,))}), "storage of 4 numbers where"),
    "storage_is_shorter": (with_tensor(writer.tensor(Call("torch.storage._load_from_bytes", (
        writer.legacy(writer.storage_id(ONE, count=16), {"0": ONE}, counts={"0": 16}),)), (4, 4))), "storage of 16 numbers"),
    "storage_is_negative": (legacy({SOME: writer.tensor(writer.storage_id(ONE, count=-4), (4,))}), "persistent id"),
    "storage_in_two_types": (legacy({"a": writer.tensor(writer.storage_id(ONE), (4,)),
                                     "b": writer.tensor(writer.storage_id(ONE, type=Name("torch.DoubleStorage")), (4,))}), "in two ways"),
    "view_of_a_storage": (legacy({SOME: writer.tensor(writer.storage_id(ONE, view=("1", 0, 4)), (4,))}), "persistent id"),
    "zip_storage_is_shorter": (lambda: zip_with(dumps({SOME: writer.tensor(writer.storage_id(ONE, count=4096), (4,))})), "16 bytes in"),
    "tensor_behind_its_storage": (with_tensor(writer.tensor(STORED, (4, 4), offset=7)), "leads out of its storage"),
    "tensor_of_a_terabyte": (with_tensor(writer.tensor(STORED, (HUGE, HUGE), strides=(0, 0))), "leads out of its storage"),
    "tensor_of_overflowing_shape": (with_tensor(writer.tensor(STORED, (HUGE,) * 8, strides=(0,) * 8)), "leads out of its storage"),
    "tensor_of_nine_axes": (with_tensor(writer.tensor(STORED, (1,) * 9, strides=(0,) * 9)), "rebuilds a tensor"),
    "tensor_of_negative_shape": (with_tensor(writer.tensor(STORED, (-4, -4))), "rebuilds a tensor"),
    "tensor_without_strides": (with_tensor(writer.tensor(STORED, (4, 4), strides=(1,))), "rebuilds a tensor"),
    "thousand_tensors_in_one_storage": (legacy({f"a{i}": writer.tensor(writer.storage_id(ONE), (4,)) for i in range(1000)}),
                                        "bytes of tensors in 16 bytes"),
    "billion_blocks": (kwargs(num_blocks=10**9), "num_blocks: 1000000000, but its tensors say 1"),
    "wide_by_description": (kwargs(model_channels=10**9), "model_channels: 1000000000"),
    "endless_channel_mult": (kwargs(channel_mult=[1] * 5000), "constructor argument channel_mult"),
    "integer_of_no_size": (kwargs(label_dim=1 << 90), "constructor argument label_dim"),
    "module_as_argument": (kwargs(dropout=writer.persistent("EDMPrecond", {})), "constructor argument dropout"),
    "resolution_by_name": (lambda: writer.save_zip(renamed("4x4", "65536x65536")), "allowed: up to 4096"),
    "resolution_of_many_digits": (lambda: writer.save_zip(renamed("4x4", "9" * 40 + "x" + "9" * 40)), "not named as in EDM"),
    "table_of_a_billion": (lambda: writer.edm_pickle(STATE, {**SPEC, "precond": "iDDPMPrecond", "M": 10**9}), "network.M"),
    "not_finite": (nans, "not finite: model.map_layer0.weight"),
    # archives
    "zip_bomb": (lambda: writer.zip_file({"a/data.pkl": bytes(50_000_000)}, compression=zipfile.ZIP_DEFLATED), "is compressed"),
    "zip_leads_out": (lambda: zip_with(**{"../../executed": b"x"}), "leads out of the archive"),
    "zip_absolute": (lambda: zip_with(**{"/tmp/executed": b"x"}), "leads out of the archive"),
    "zip_overlaps": (overlapping_zip, "two members named"),
    "zip_twice_the_same": (duplicate_zip, "two members named"),
    "zip_encrypted": (encrypted_zip, "encrypted"),
    "zip_of_something_else": (lambda: writer.zip_file({"word/document.xml": b"x"}), "0 members named data.pkl"),
    "zip_without_a_storage": (lambda: edited(zip_with(), b"a/data/0", b"a/data/1"), "has no member"),
    "zip_big_endian": (lambda: zip_with(**{"a/byteorder": b"big"}), "byte order"),
    "zip_cut_off": (lambda: zip_with()[:-30], "without an end"),
    "zip_directory_elsewhere": (lambda: zip_with()[:-6] + b"\xf0\xff\xff\xff\x00\x00", "cut off or damaged"),
    "zip_with_64_bit_lies": (lambda: zip_with()[:-22] + b"PK\x06\x07" + struct.pack("<IQI", 0, 1 << 60, 1) + zip_with()[-22:],
                             "cut off or damaged"),
    # safetensors
    "safetensors_overlap": (header({"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}), "overlap or leave gaps"),
    "safetensors_gap": (header({"dtype": "F32", "shape": [1], "data_offsets": [12, 16]}), "overlap or leave gaps"),
    "safetensors_behind_the_end": (header({"dtype": "F32", "shape": [1 << 40], "data_offsets": [8, 8 + (4 << 40)]}), "cut off"),
    "safetensors_lies_about_shape": (header({"dtype": "F32", "shape": [1 << 20], "data_offsets": [8, 16]}), "its shape"),
    "safetensors_negative": (header({"dtype": "F32", "shape": [-2], "data_offsets": [8, 16]}), "no valid shape"),
    "safetensors_type": (header({"dtype": "PICKLE", "shape": [2], "data_offsets": [8, 16]}), "type 'PICKLE'"),
    "safetensors_header_of_a_terabyte": (lambda: struct.pack("<Q", 1 << 39) + b"{}", "header should have"),
    "safetensors_twice_the_same": (lambda: writer.safetensors_raw(b'{"a":{},"a":{}}', b""), "names something twice"),
    "safetensors_nested": (lambda: writer.safetensors_raw(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b""), "nested too deeply"),
    "safetensors_description": (lambda: writer.safetensors_raw({"__metadata__": {"sim_jax": "[" * 100_000}}, b""), "does not describe"),
    "safetensors_sigma": (lambda: writer.safetensors_raw({"__metadata__": {"sim_jax": '{"network": {}, "sigma_init": "x"}'}}, b""),
                          "no possible sigma_init"),
    # what one downloads by mistake
    "empty": (lambda: b"", "is empty"),
    "text": (lambda: b"Not a checkpoint\n" * 100, "neither a pickle"),
    "web_page": (lambda: b"<!DOCTYPE html><html>404</html>", "neither a pickle"),
    "lfs_pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "neither a pickle"),
    "another_pickle": (lambda: pickle.dumps({"a": [1, 2]}), "no state dict: a is a list"),
    "a_pickled_number": (lambda: pickle.dumps(7), "holds 7, expected a dict with 'ema'"),
    "pickle_cut_off": (lambda: EDM()[:len(EDM()) // 2], "cut off"),
    "pickle_with_more_behind": (lambda: EDM() + b"x" * 9, "9 bytes behind the end"),
    "legacy_cut_off": (lambda: writer.save_legacy(STATE)[:-8], "cut off"),
    "nothing_but_a_start": (lambda: b"\x80", "is cut off"),
    "unprintable_name": (lambda: writer.save_zip({"\x1b[2Jmodel\n": ONE}), "under the name '\\x1b[2Jmodel\\n'"),
    "surrogate_name": (pkl({"ema": Raw(b"X\x03\x00\x00\x00\xed\xa0\x80")}), "no state dict"),
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refuse(path, capsys, kind="edm"):
    """Converts; returns the one line. No file appeared, no memory beyond the file's own size, no time."""
    start = time.monotonic()
    tracemalloc.start()
    try:
        code = command.main([f"--kind={kind}", f"--src={path}", "--out=out"])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    captured = capsys.readouterr()
    assert code == 2 and captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and "Traceback" not in captured.err
    assert captured.err.removesuffix("\n").isprintable() and len(captured.err) < 1000
    assert not os.path.exists("executed") and not os.path.exists("out")
    assert peak < 300e6 and time.monotonic() - start < 60
    return captured.err


@pytest.mark.parametrize("name", FILES)
def test_refused_in_one_line(name, capsys):
    make, message = FILES[name]
    with open("file", "wb") as file:
        file.write(make())
    assert message in refuse("file", capsys)


def test_the_honest_file_passes(tmp_path):
    """Or the tests above would prove nothing."""
    (tmp_path / "file").write_bytes(EDM())
    assert command.main(["--kind=edm", "--src=file", "--out=out"]) == 0


@pytest.mark.parametrize("kind", ["edm", "edm2", "sid", "dmd2", "fastgen", "safetensors"])
def test_every_kind_refuses(kind, capsys):
    for content in (dumps(SYSTEM), b"text", b"", pickle.dumps({"model": {"net": 3}}), pickle.dumps({"ema": None}),
                    writer.safetensors_raw({}, b""), pickle.dumps([]), pickle.dumps({"model": {}})):
        with open("file", "wb") as file:
            file.write(content)
        refuse("file", capsys, kind)


def test_the_command_itself(tmp_path):
    """As a process of its own, with 3 GB of address space behind it."""
    (tmp_path / "file").write_bytes(in_ema(SYSTEM)())
    limit = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_DATA, (3 << 30, 3 << 30)); sys.argv[0] = 'convert'; "
    done = subprocess.run(
        [sys.executable, "-c", limit + "runpy.run_module('sim_jax.convert', run_name='__main__')", "--kind=edm", "--src=file", "--out=out"],
        capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: file: asks for 'posix.system', which is not among the constructors that are allowed; nothing was executed\n"


def test_paths_that_are_no_files(tmp_path, capsys):
    os.mkfifo("pipe")
    os.symlink("nowhere", "dangling")
    os.symlink("loop", "loop")
    os.symlink("/dev/zero", "zeros")
    for path, message in (("pipe", "not a regular file"), ("dangling", "No such file"), ("loop", "cannot be read"),
                          ("zeros", "not a regular file"), (".", "not a regular file"), ("absent", "No such file"), ("", "")):
        assert message in refuse(path, capsys)


def test_a_link_to_a_file_is_that_file(tmp_path):
    (tmp_path / "file").write_bytes(EDM())
    os.symlink("file", "link")
    assert command.main(["--kind=edm", "--src=link", "--out=out"]) == 0


def test_the_output_does_not_follow_links_of_files(tmp_path):
    """A params.safetensors that links elsewhere is replaced, what it pointed to stays."""
    (tmp_path / "file").write_bytes(EDM())
    (tmp_path / "precious").write_text("mine")
    os.mkdir("out")
    os.symlink("../precious", "out/params.safetensors")
    assert command.main(["--kind=edm", "--src=file", "--out=out"]) == 0
    assert (tmp_path / "precious").read_text() == "mine" and not os.path.islink("out/params.safetensors")


def test_an_output_that_is_a_file(tmp_path, capsys):
    (tmp_path / "file").write_bytes(EDM())
    assert command.main(["--kind=edm", "--src=file", "--out=file"]) == 2
    assert "out: got 'file'" in capsys.readouterr().err and (tmp_path / "file").read_bytes() == EDM()


def test_a_refused_file_leaves_an_existing_directory_alone(tmp_path, capsys):
    (tmp_path / "file").write_bytes(EDM())
    assert command.main(["--kind=edm", "--src=file", "--out=teacher"]) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "teacher").iterdir()}
    (tmp_path / "bad").write_bytes(dumps(SYSTEM))
    assert command.main(["--kind=edm", "--src=bad", "--out=teacher"]) == 2
    assert {path: path.read_bytes() for path in (tmp_path / "teacher").iterdir()} == before
    assert json.loads((tmp_path / "teacher" / "network.json").read_text())["network"]["model_channels"] == 4
