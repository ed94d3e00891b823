"""Checkpoints: exact round trips, onto other devices, retention, and damage."""

import functools
import pathlib
import shutil

import jax
import numpy as np
import pytest
import tiny

from sim_jax import checkpoint, sharding

FSDP, COPIES = ((".*", "fsdp"),), ((".*", "replicate"),)


def shardings_on(state, count, rules):
    return sharding.tree_shardings(state, sharding.make_mesh("data:-1", devices=jax.devices()[:count]), rules)


def shapes_of(state):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(np.shape(a), np.asarray(a).dtype), state)


def varied(state, step: int):
    """No two arrays alike, integers included."""
    leaves, structure = jax.tree.flatten(state)
    rng = np.random.default_rng(step)
    return jax.tree.unflatten(structure, [
        np.full(np.shape(a), step + i, a.dtype) if a.dtype.kind == "i" else rng.standard_normal(np.shape(a)).astype(a.dtype)
        for i, a in enumerate(map(np.asarray, leaves))])


@functools.cache
def states():
    empty = tiny.host_state(tiny.recipe(tiny.PixelNet()))
    return {step: varied(empty, step) for step in (1, 2, 3)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Steps 1, 2, 3 saved cut over eight devices, two of them kept."""
    folder = tmp_path_factory.mktemp("workdir") / "checkpoints"
    with checkpoint.Checkpoints(folder, keep=2) as checkpoints:
        assert checkpoints.latest() is None
        for step, state in states().items():
            placed = sharding.place(state, shardings_on(state, 8, FSDP))
            checkpoints.save(step, placed, {"seconds": step + 0.5})
            jax.tree.map(lambda a: a.delete(), placed)  # what donation to the next step does
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return pathlib.Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def test_retention(saved):
    assert sorted(p.name for p in saved.iterdir()) == ["2", "3"]
    with checkpoint.Checkpoints(saved, keep=2) as checkpoints:
        assert checkpoints.latest() == 3


@pytest.mark.parametrize("count, rules", [(8, FSDP), (4, FSDP), (4, COPIES), (1, COPIES)])
def test_restored_onto_any_devices(saved, count, rules):
    """Everything, the optimiser's moments and counts included, bit for bit, and lying as asked."""
    state = states()[3]
    wanted = shardings_on(state, count, rules)
    with checkpoint.Checkpoints(saved, keep=2) as checkpoints:
        restored, meta = checkpoints.restore(3, shapes_of(state), wanted)
    assert meta == {"seconds": 3.5}
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, sharding.to_host(restored), state)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, s, b: a.sharding == s and a.dtype == b.dtype, restored, wanted, state)))


def test_older_step(saved):
    state = states()[2]
    with checkpoint.Checkpoints(saved, keep=2) as checkpoints:
        restored, _ = checkpoints.restore(2, shapes_of(state), shardings_on(state, 1, COPIES))
    jax.tree.map(np.testing.assert_array_equal, sharding.to_host(restored), state)


def test_saving_backwards_is_refused(copy):
    """The same step twice is one checkpoint; an older one would be dropped in silence, so it raises."""
    state = states()[3]
    placed = sharding.place(state, shardings_on(state, 1, COPIES))
    with checkpoint.Checkpoints(copy, keep=2) as checkpoints:
        checkpoints.save(3, placed, {})
        with pytest.raises(RuntimeError, match="checkpoint 1 was not saved"):
            checkpoints.save(1, placed, {})


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_damaged_checkpoint(copy, damage):
    victim = max((copy / "3" / "state" / "d").iterdir(), key=lambda p: p.stat().st_size)
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    state = states()[3]
    with checkpoint.Checkpoints(copy, keep=2) as checkpoints, pytest.raises(ValueError) as error:
        checkpoints.restore(3, shapes_of(state), shardings_on(state, 1, COPIES))
    message = str(error.value)
    assert "\n" not in message and "checkpoint" in message and "cannot be restored" in message and "[2, 3]" in message


def test_another_architecture(saved):
    other = tiny.host_state(tiny.recipe(tiny.PixelNet(hidden=32)))
    with checkpoint.Checkpoints(saved, keep=2) as checkpoints, pytest.raises(ValueError, match="cannot be restored") as error:
        checkpoints.restore(3, shapes_of(other), shardings_on(other, 1, COPIES))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", [("generator", "ema", "ema_0.02k"), ("generator", "params"), ("fake_score", "params")])
def test_read_one_network(saved, path):
    """One tree out of the newest checkpoint, without the rest, on one device."""
    network = getattr(states()[3], path[0])
    expected = network.params if path[1] == "params" else network.ema[path[2]]
    step, tree = checkpoint.read_tree(saved, path, shapes_of(expected))
    assert step == 3
    jax.tree.map(np.testing.assert_array_equal, tree, expected)
    assert {len(a.sharding.device_set) for a in jax.tree.leaves(tree)} == {1}


def test_read_what_is_not_there(saved, tmp_path):
    shapes = tiny.PixelNet().shapes()
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match="no checkpoint there"):
            checkpoint.read_tree(folder, ("generator", "params"), shapes)
    with pytest.raises(ValueError, match="cannot read generator/ema/ema_7k") as error:
        checkpoint.read_tree(saved, ("generator", "ema", "ema_7k"), shapes)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="cannot read generator/params"):
        checkpoint.read_tree(saved, ("generator", "params"), tiny.PixelNet(hidden=32).shapes())


def test_unfinished_save_is_passed_over(copy):
    """What a killed process leaves behind is neither the newest step nor in the way of saving that step."""
    shutil.copytree(copy / "3", copy / "4.orbax-checkpoint-tmp")
    shapes = tiny.PixelNet().shapes()
    assert checkpoint.read_tree(copy, ("generator", "params"), shapes)[0] == 3
    state = states()[3]
    with checkpoint.Checkpoints(copy, keep=2) as checkpoints:
        assert checkpoints.latest() == 3
        checkpoints.save(4, sharding.place(state, shardings_on(state, 1, COPIES)), {})
    assert sorted(p.name for p in copy.iterdir()) == ["3", "4"]


def test_read_json(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1')
    for name, words in (("a.json", "not JSON"), ("b.json", "missing or unreadable")):
        with pytest.raises(ValueError, match=words) as error:
            checkpoint.read_json(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)
