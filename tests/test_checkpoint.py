"""Checkpoints: exact round trips, onto other devices, retention, and damage."""

import errno
import functools
import pathlib
import re
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


def test_the_newest_stay(saved):
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


def flip(path, at: float = 0.5):
    """One bit of a file."""
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 16
    path.write_bytes(bytes(data))


def largest(folder):
    return max((p for p in (folder / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


DAMAGE = {
    "a flipped bit": (lambda step: flip(largest(step)), "the content of state/.* has changed"),
    "a flipped bit of orbax's description": (lambda step: flip(step / "state" / "_METADATA"), "the content of state/_METADATA has changed"),
    "a flipped bit of the seconds": (lambda step: flip(step / "meta" / "metadata"), "the content of meta/metadata has changed"),
    "truncated": (lambda step: largest(step).write_bytes(largest(step).read_bytes()[:-7]), r"state/.* has \d+ bytes instead of \d+"),
    "a missing file": (lambda step: largest(step).unlink(), "state/.* is missing"),
    "no manifest": (lambda step: (step / "MANIFEST.json").unlink(), "it has no MANIFEST.json"),
    "a manifest that is no JSON": (lambda step: (step / "MANIFEST.json").write_bytes(b"{"), "MANIFEST.json cannot be read"),
    "another step's manifest": (lambda step: shutil.copy(step.parent / "2" / "MANIFEST.json", step), "MANIFEST.json is that of step 2"),
    "an empty folder": (lambda step: (shutil.rmtree(step), step.mkdir()), "it has no MANIFEST.json"),
}


def newest(folder, state=None, **knobs):
    """(what restore_newest gives, its lines)."""
    state, lines = states()[3] if state is None else state, []
    with checkpoint.Checkpoints(folder, **{"keep": 2, "note": lines.append, **knobs}) as checkpoints:
        return checkpoints.restore_newest(shapes_of(state), shardings_on(state, 1, COPIES)), lines


def test_an_undamaged_folder_gives_the_newest_step_and_says_nothing(copy):
    (step, state, meta), lines = newest(copy)
    assert (step, meta, lines) == (3, {"seconds": 3.5}, [])
    jax.tree.map(np.testing.assert_array_equal, sharding.to_host(state), states()[3])


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_step_is_put_aside_and_the_one_before_it_used(copy, damage):
    harm, why = DAMAGE[damage]
    harm(copy / "3")
    harmed = {p.relative_to(copy / "3"): p.read_bytes() for p in (copy / "3").rglob("*") if p.is_file()}
    lines = []
    path = ("generator", "params")
    shapes = tiny.PixelNet().shapes()
    assert checkpoint.read_tree(copy, path, shapes, note=lines.append)[0] == 2          # whoever samples changes nothing
    assert len(lines) == 1 and re.search(f"3: damaged .{why}.; using step 2", lines[0]) and (copy / "3").is_dir()
    (step, state, meta), lines = newest(copy)
    assert (step, meta) == (2, {"seconds": 2.5})
    jax.tree.map(np.testing.assert_array_equal, sharding.to_host(state), states()[2])
    assert re.fullmatch(f"checkpoint 3 is damaged .{why}.: put aside as 3.damaged", lines[0])
    assert lines[1:] == ["step 2 is the newest good checkpoint"]
    assert {p.relative_to(copy / "3.damaged"): p.read_bytes() for p in (copy / "3.damaged").rglob("*") if p.is_file()} == harmed
    with checkpoint.Checkpoints(copy, keep=2) as checkpoints:                            # training comes by step 3 again
        checkpoints.save(3, sharding.place(states()[3], shardings_on(states()[3], 1, COPIES)), {"seconds": 4.0})
    (step, state, meta), lines = newest(copy)
    assert (step, meta, lines) == (3, {"seconds": 4.0}, []) and (copy / "3.damaged").is_dir()
    flip(largest(copy / "3"))
    assert newest(copy)[1][0].endswith("put aside as 3.damaged.2")


def test_where_no_step_is_good_nothing_is_touched(copy):
    flip(largest(copy / "2"))
    largest(copy / "3").unlink()
    before = {p.relative_to(copy): p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=r"no checkpoint there is good \(step 3: state/.* is missing; step 2: the content of .* has changed\)"):
        newest(copy)
    with pytest.raises(ValueError, match=r"no checkpoint there is good \(step 3: "):
        checkpoint.read_tree(copy, ("generator", "params"), tiny.PixelNet().shapes())
    assert {p.relative_to(copy): p.read_bytes() for p in copy.rglob("*") if p.is_file()} == before


def test_steps_of_an_earlier_version_are_used_where_none_is_verified(copy):
    """They have no manifest: orbax's reading them is all the verification there is, and the run says so."""
    for step in "23":
        (copy / step / "MANIFEST.json").unlink()
    (step, _, _), lines = newest(copy)
    assert step == 3 and lines == ["checkpoint 3 is of an earlier version, without a manifest: orbax could read it, its content is not verified"]
    assert checkpoint.read_tree(copy, ("generator", "params"), tiny.PixelNet().shapes())[0] == 3
    (copy / "3" / "state" / "manifest.ocdbt").unlink()
    assert checkpoint.read_tree(copy, ("generator", "params"), tiny.PixelNet().shapes(), note=lines.append)[0] == 2
    (step, _, _), lines = newest(copy)
    assert step == 2 and "checkpoint 3 is damaged" in lines[0] and "is of an earlier version" in lines[-1]


def test_a_folder_that_holds_another_step_is_refused(copy):
    """Keys, data and schedules of the next iteration come from the step in the state."""
    shutil.copytree(copy / "2", copy / "5")
    manifest = (copy / "5" / "MANIFEST.json").read_text()
    (copy / "5" / "MANIFEST.json").write_text(manifest.replace('"step": 2', '"step": 5'))
    (step, _, _), lines = newest(copy)
    assert step == 3 and "5: holds the state of step 2): put aside as 5.damaged" in lines[0]


def test_a_manifest_is_there_as_soon_as_a_step_is(tmp_path, monkeypatch):
    """Both come by one rename, and nothing older goes before it."""
    seen = []
    write = checkpoint.manifest.write

    def watched(folder, step):
        seen.append((sorted(p.name for p in tmp_path.iterdir()), checkpoint.latest_step(tmp_path)))
        write(folder, step)
        assert not (tmp_path / str(step)).exists()

    monkeypatch.setattr(checkpoint.manifest, "write", watched)
    with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
        for step, state in states().items():
            checkpoints.save(step, sharding.place(state, shardings_on(state, 1, COPIES)), {})
            assert checkpoints.latest() in (None, step - 1, step)
            checkpoints.wait()
            assert checkpoints.latest() == step and (tmp_path / str(step) / "MANIFEST.json").is_file()
    assert [newest for _, newest in seen] == [None, 1, 2]
    assert [[n for n in names if n.isdigit()] for names, _ in seen] == [[], ["1"], ["2"]]


def test_a_save_that_fails_is_heard_of_and_harms_nothing(copy, monkeypatch):
    def fail(*unused):
        raise OSError(errno.ENOSPC, "No space left on device")

    state = states()[3]
    monkeypatch.setattr(checkpoint.manifest, "write", fail)
    with pytest.raises(OSError, match="No space left"):
        with checkpoint.Checkpoints(copy, keep=2) as checkpoints:
            checkpoints.save(4, sharding.place(state, shardings_on(state, 1, COPIES)), {})
    assert newest(copy)[0][0] == 3 and not list(copy.glob("4*"))


def test_retention(tmp_path):
    """The newest two, every fourth, and the best."""
    state = states()[1]
    placed = sharding.place(state, shardings_on(state, 1, COPIES))
    with checkpoint.Checkpoints(tmp_path, keep=2, keep_every=4, best="fd") as checkpoints:
        for step, fd in enumerate((0.9, 0.2, 0.5, 0.2, 0.8, 0.9, 0.3), 1):
            checkpoints.save(step, placed, {})
            checkpoints.record(step, {"fd/generator": fd + 0.05, "fd/generator_raw": fd, "class_agreement/generator": 0.0})
        assert checkpoints.measured(7) and not checkpoints.measured(8)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "4", "6", "7", "figures.json"]
    (tmp_path / "figures.json").write_text("[")                           # it only says what may go
    with checkpoint.Checkpoints(tmp_path, keep=2, keep_every=4, best="fd") as checkpoints:
        checkpoints.save(9, placed, {})
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["4", "7", "9"]


def test_what_is_superfluous():
    rule = checkpoint.step_folders.superfluous
    assert rule(range(1, 11), keep=3) == [1, 2, 3, 4, 5, 6, 7]
    assert rule(range(1, 11), keep=1, keep_every=5, best=3) == [1, 2, 4, 6, 7, 8, 9]
    assert rule([7], keep=1) == [] and rule([], keep=2) == []


def test_another_architecture(saved):
    other = tiny.host_state(tiny.recipe(tiny.PixelNet(hidden=32)))
    with checkpoint.Checkpoints(saved, keep=2) as checkpoints, pytest.raises(ValueError, match="holds another state") as error:
        checkpoints.restore(3, shapes_of(other), shardings_on(other, 1, COPIES))
    assert "\n" not in str(error.value)
    assert "fake_score/opt_state/1/nu/dec/weight: float32[64, 16] is saved, float32[32, 16] is trained; " in str(error.value)
    assert "and 14 more" in str(error.value) and sorted(p.name for p in saved.iterdir()) == ["2", "3"]


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
    shutil.copytree(copy / "3", copy / "1.deleting")
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
