"""The restricted reader: values of the formats, views instead of copies, and the pickle operations one by one."""

import pickle
import struct

import ml_dtypes
import numpy as np
import pytest

import checkpoint_writer as writer
from sim_jax import tensor_file
from sim_jax.convert import torch_state, zip_members
from sim_jax.convert.conversion import arrays
from sim_jax.convert.pickle_machine import Budget, Machine, Record, Refused


def machine(content, **names):
    return Machine(memoryview(content), 0, names, None, Budget())


def run(content):
    return machine(content).run()


def read(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    return torch_state.read(tmp_path / "file")


PLAIN = {"text": "é😀", "list": [1, -2, 2**40, -(2**60), True, False, None, 0.5], "tuple": (1, (2, (3, 4)), ()),
         "dict": {"a": {1: {}}, "b": []}, "bytes": b"123", "set": {"x"}, "frozen": frozenset(["y"]), "long": list(range(2000))}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_as_the_standard_library_reads_them(protocol):
    value = dict(PLAIN)
    if protocol < 4:  # written by calls of constructors there
        value = {key: value[key] for key in ("text", "list", "tuple", "dict", "long")}
    got = run(pickle.dumps(value, protocol))
    if protocol >= 4:
        assert isinstance(got["bytes"], memoryview)  # a view of the input
        got["bytes"] = bytes(got["bytes"])
    assert got == value


def test_shared_and_circular_values_keep_their_identity():
    inner = [1]
    value = {"a": inner, "b": inner}
    value["self"] = value
    got = run(pickle.dumps(value))
    assert got["a"] is got["b"] and got["self"] is got


def test_writer_agrees_with_the_standard_library():
    value = {key: PLAIN[key] for key in ("text", "list", "tuple", "dict", "bytes", "set", "long")}
    assert pickle.loads(writer.dumps(value)) == value


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "posix.system", "x.y.z"])
def test_names_outside_of_the_table_are_refused_by_name(name):
    with pytest.raises(Refused, match=f"asks for '{name}', which is not among the constructors"):
        run(writer.dumps(writer.Name(name)))


def test_names_in_the_table_are_called_with_plain_arguments():
    content = writer.dumps([writer.Call("a.b", (1, "x")), writer.New("a.b", ())])
    assert machine(content, **{"a.b": lambda args: ("called", args)}).run() == [("called", (1, "x")), ("called", ())]


def test_build_sets_the_state_of_records_once():
    make = {"a.b": lambda args: Record("a.b", args)}
    record = machine(writer.dumps(writer.Build(writer.New("a.b"), {"x": 1})), **make).run()
    assert (record.kind, record.state) == ("a.b", {"x": 1})
    with pytest.raises(Refused, match="sets the state of 'a.b'"):
        machine(writer.dumps(writer.Build(writer.Build(writer.New("a.b"), {}), {})), **make).run()
    with pytest.raises(Refused, match="sets the state of a list"):
        run(writer.dumps(writer.Build([1], {})))


ARRAYS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.float32(3.5).reshape(()), "c": np.zeros((0, 4), np.float32),
          "d": np.arange(4, dtype=np.float16), "e": np.arange(3, dtype=np.int64), "f": np.arange(5, dtype=ml_dtypes.bfloat16)}


@pytest.mark.parametrize("save", [writer.save_zip, writer.save_legacy])
def test_both_formats_of_torch_save(save, tmp_path):
    got = arrays(read(tmp_path, save(ARRAYS)))
    assert got.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert got[name].dtype == array.dtype and got[name].shape == array.shape
        np.testing.assert_array_equal(got[name].astype(np.float64), array.astype(np.float64))


def test_storages_inside_of_a_pickle(tmp_path):
    content = writer.dumps({"ema": {name: writer.tensor(writer.embedded(array), array.shape) for name, array in ARRAYS.items()}})
    got = arrays(read(tmp_path, content)["ema"])
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(got[name].astype(np.float64), array.astype(np.float64))
    zipped = writer.zip_file({"x/data.pkl": writer.dumps(writer.storage_id(ARRAYS["a"])), "x/data/0": ARRAYS["a"].tobytes()})
    content = writer.dumps({"a": writer.tensor(writer.Call("torch.storage._load_from_bytes", (zipped,)), (2, 3))})
    np.testing.assert_array_equal(arrays(read(tmp_path, content))["a"], ARRAYS["a"])


def test_tensors_are_views_with_strides_and_offsets(tmp_path):
    base = np.arange(12, dtype=np.float32)
    value = {"t": writer.tensor(writer.storage_id(base), (3, 2), offset=1, strides=(1, 4)),
             "u": writer.tensor(writer.storage_id(base), (12,))}
    got = arrays(read(tmp_path, writer.legacy(value, {"0": base})))
    np.testing.assert_array_equal(got["t"], base[1:9].reshape(2, 4)[:, :3].T)
    assert np.shares_memory(got["t"], got["u"]) and not got["u"].flags.writeable


def test_numpy_scalars_and_containers_become_plain_values(tmp_path):
    dtype = writer.Build(writer.Call("numpy.dtype", ("f8", False, True)), (3, "<", None, None, None, -1, -1, 0))
    value = {"scale": writer.Call("numpy._core.multiarray.scalar", (dtype, struct.pack("<d", 0.7071))),
             "old": writer.Call("numpy.core.multiarray.scalar", (dtype, struct.pack("<d", 2.0))),
             "od": writer.Build(writer.Call("collections.OrderedDict"), {"_metadata": {"version": 1}}),
             "device": writer.Call("torch.device", ("cpu",)), "size": writer.Call("torch.Size", ((2, 3),)),
             "easy": writer.New("dnnlib.util.EasyDict"), "type": writer.Name("torch.float32"),
             "latin": writer.Call("_codecs.encode", ("a\xff", "latin1")), "set": writer.Call("builtins.set", (["a"],))}
    got = read(tmp_path, writer.dumps(value))
    assert got["scale"] == 0.7071 and got["old"] == 2.0 and got["od"] == {} and got["device"] == "cpu" and got["size"] == (2, 3)
    assert got["easy"] == {} and got["latin"] == b"a\xff" and got["set"] == {"a"}


def test_persistent_objects_are_inert(tmp_path):
    record = read(tmp_path, writer.dumps({"ema": writer.persistent("Net", {"x": 1})}))["ema"]
    assert isinstance(record, Record) and record.args == ("Net",) and record.state == {"x": 1}


def test_zip_members_are_views():
    content = memoryview(writer.zip_file({"a/b": b"hello", "a/c": b""}))
    got = zip_members.members(content)
    assert {name: bytes(view) for name, view in got.items()} == {"a/b": b"hello", "a/c": b""} and got["a/b"].obj is content.obj


def test_safetensors_round_trip(tmp_path):
    with open(tmp_path / "x.safetensors", "wb") as file:
        tensor_file.write(file, ARRAYS, metadata={"k": "v"})
    got, metadata = tensor_file.read(tmp_path / "x.safetensors")
    assert metadata == {"k": "v"} and got.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert got[name].dtype == array.dtype
        np.testing.assert_array_equal(got[name].astype(np.float64), array.astype(np.float64))
    assert torch_state.read(tmp_path / "x.safetensors").keys() == ARRAYS.keys()


def test_written_bytes_do_not_depend_on_the_order_of_names(tmp_path):
    for name, state in (("a", ARRAYS), ("b", dict(reversed(ARRAYS.items())))):
        with open(tmp_path / name, "wb") as file:
            tensor_file.write(file, state)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
