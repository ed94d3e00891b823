"""Mesh strings, rules, and what they cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sim_jax import sharding


def mesh(axes, count=8):
    return sharding.make_mesh(axes, devices=jax.devices()[:count])


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def specs(tree, rules, axes="data:-1", count=4):
    return jax.tree.map(lambda s: s.spec, sharding.tree_shardings(tree, mesh(axes, count), rules))


@pytest.mark.parametrize("axes, count, expected", [
    ("data:-1", 8, {"data": 8}), ("data:8", 8, {"data": 8}), ("data:-1", 1, {"data": 1}), ("data:2,fsdp:4", 8, {"data": 2, "fsdp": 4}),
    ("data:-1, fsdp:2", 8, {"data": 4, "fsdp": 2}), ("replica:2,data:-1,fsdp:2", 8, {"replica": 2, "data": 2, "fsdp": 2}),
])
def test_mesh(axes, count, expected):
    made = mesh(axes, count)
    assert dict(made.shape) == expected and made.size == count
    assert set(made.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize("axes", ["", "data", "data:x", "data:3", "data:0", "data:-2", "data:-1,fsdp:-1", "data:2,data:4", "data:2", "data:16",
                                  "data:2:4", "data:2;fsdp:4", ":8"])
def test_bad_mesh(axes):
    with pytest.raises(ValueError) as error:
        mesh(axes)
    message = str(error.value)
    assert message.startswith("sharding.mesh: ") and repr(axes) in message and "allowed" in message and "\n" not in message


def test_first_match_wins():
    tree = {"generator": {"params": {"enc": {"weight": shape(64, 64)}}, "ema": {"weight": shape(64, 64)}}}
    rules = [("ema", "replicate"), ("generator", "fsdp"), (".*", "replicate")]
    assert specs(tree, rules) == {"generator": {"params": {"enc": {"weight": P(None, "data")}}, "ema": {"weight": P()}}}
    assert specs(tree, rules[1:])["generator"]["ema"]["weight"] == P(None, "data")


def test_paths_are_slashed():
    """A rule sees the whole path, so it can name one array."""
    tree = {"generator": {"params": {"enc": {"32x32_conv": {"weight": shape(64, 64)}}}}}
    cut = specs(tree, [("^generator/params/enc/32x32_conv/weight$", "fsdp")])
    assert cut["generator"]["params"]["enc"]["32x32_conv"]["weight"] == P(None, "data")


def test_unmatched_array_is_named():
    with pytest.raises(ValueError, match=r"no rule matches fake_score/params/weight \(64, 3\)"):
        specs({"generator": {"weight": shape(8)}, "fake_score": {"params": {"weight": shape(64, 3)}}}, [("generator", "replicate")])


@pytest.mark.parametrize("sizes, expected", [
    ((3, 3, 256, 512), P(None, None, None, "data")),   # the largest
    ((3, 3, 512, 256), P(None, None, "data", None)),
    ((3, 3, 512, 510), P(None, None, "data", None)),   # the largest that divides by 4
    ((3, 3, 256, 514), P(None, None, "data", None)),   # 514 is larger, but does not
    ((3, 3, 1023, 1025), P()),                         # none divides
    ((512,), P()), ((4, 255), P()),                    # fewer than 1024 numbers
    ((1024,), P("data")), ((), P()),
])
def test_what_fsdp_cuts(sizes, expected):
    assert specs({"w": shape(*sizes)}, [(".*", "fsdp")])["w"] == expected


def test_fsdp_axis():
    """The last axis of the mesh, or the one that the rule names; the other axis holds copies."""
    tree = {"a": shape(64, 64), "b": shape(64, 64)}
    assert specs(tree, [("a", "fsdp"), ("b", "fsdp:data")], "data:2,fsdp:2") == {"a": P(None, "fsdp"), "b": P(None, "data")}


@pytest.mark.parametrize("rule", [(".*", "shard"), (".*", "fsdp:model"), (".*",), ("(", "replicate"), (".*", 4), (".*", "replicate:data"), 7])
def test_bad_rules(rule):
    with pytest.raises(ValueError) as error:
        sharding.check_rules([rule], mesh("data:2,fsdp:4"))
    message = str(error.value)
    assert message.startswith("sharding.rules: got ") and "allowed" in message and "\n" not in message


def test_good_rules():
    sharding.check_rules([("params", "fsdp"), ("ema", "fsdp:data"), (".*", "replicate")], mesh("data:2,fsdp:4"))


def test_place_and_back():
    """Host -> cut over devices -> host is the identity, and each device holds its part alone."""
    tree = {"a": np.arange(64.0 * 64, dtype=np.float32).reshape(64, 64), "b": np.float32([1, 2, 3]), "step": np.int32(5)}
    shardings = sharding.tree_shardings(tree, mesh("data:-1"), [(".*", "fsdp")])
    placed = sharding.place(tree, shardings)
    assert {s.data.shape for s in placed["a"].addressable_shards} == {(64, 8)}
    assert placed["b"].is_fully_replicated and placed["step"].dtype == np.int32
    jax.tree.map(np.testing.assert_array_equal, sharding.to_host(placed), tree)


def test_placed_copies_are_apart():
    """Two networks placed from one host array, and the host array itself, share no memory: a step may overwrite one of them."""
    source = np.ones((64, 64), np.float32)
    shardings = sharding.tree_shardings({"a": source, "b": source}, mesh("data:-1", 1), [(".*", "replicate")])
    placed = sharding.place({"a": source, "b": source}, shardings)
    assert placed["a"].unsafe_buffer_pointer() != placed["b"].unsafe_buffer_pointer()
    add = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    out = jax.block_until_ready(add(placed))
    assert placed["a"].is_deleted() and placed["b"].is_deleted()
    np.testing.assert_array_equal(source, 1)
    np.testing.assert_array_equal(out["b"], 2)


def test_batch_is_cut_over_every_axis():
    layout = sharding.Layout(mesh("data:2,fsdp:2", 4))
    batch = jax.jit(lambda x: layout.split(x))(np.zeros((8, 3), np.float32))
    assert {s.data.shape for s in batch.addressable_shards} == {(2, 3)}


def test_no_mesh_constrains_nothing():
    layout, x = sharding.Layout(), {"w": np.ones(3)}
    assert layout.split(x) is x and layout.gather(x) is x and layout.scatter(x, None) is x
