"""What is said of a checkpoint is what is in it; pictures start from the noise that they say."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest

import inspected
from sim_jax import gallery, inspection, sharding
from sim_jax.evals.generate import ImageSampler, SamplerSpec


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(workdir, experiment, state)"""
    workdir = tmp_path_factory.mktemp("inspected")
    return workdir, *inspected.make(workdir)


def named(tree):
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_the_table_is_what_lay_on_the_devices(saved):
    """Names, shapes, types, specs; bytes per device as the arrays on the devices had them."""
    workdir, experiment, state = saved
    step, rows = inspection.table(workdir)
    arrays, where = named(state), named(experiment.shardings)
    assert step == 7 and [row.name for row in rows] == sorted(arrays) and inspection.steps(workdir) == [3, 7]
    placed = named(sharding.place(state, experiment.shardings))
    for row in rows:
        assert (row.shape, row.dtype) == (arrays[row.name].shape, arrays[row.name].dtype.name)
        assert row.bytes == arrays[row.name].nbytes
        assert row.bytes_per_device == placed[row.name].addressable_shards[0].data.nbytes
        assert ("fsdp" in row.spec) == (not where[row.name].is_fully_replicated)
    cut = {row.spec for row in rows if row.spec}
    assert cut == {"-, fsdp", "fsdp, -", "-, -, -, fsdp"}
    assert inspection.table(workdir, "discriminator/params", step=3)[0] == 3


def test_norms_and_distances(saved):
    workdir, _, state = saved
    rows = inspection.measure(workdir, "generator/params")
    raw, averages = named(state.generator.params), {name: named(tree) for name, tree in state.generator.ema.items()}
    assert len(rows) == len(raw) and averages
    for row in rows:
        name = row.name.removeprefix("generator/params/")
        w = raw[name].astype(np.float64)
        assert row.norm == pytest.approx(math.sqrt((w**2).sum())) and row.largest == pytest.approx(np.abs(w).max())
        assert row.rms == pytest.approx(math.sqrt((w**2).mean()))
        assert row.ema_distance.keys() == averages.keys()
        for average, distance in row.ema_distance.items():
            assert distance == pytest.approx(np.linalg.norm(averages[average][name] - w) / np.linalg.norm(w))
    assert inspection.measure(workdir, "fake_score/params")[0].ema_distance == {}


def test_values_come_back(saved):
    workdir, _, state = saved
    names = ["generator/params/enc/in/weight", "step", "fake_score/opt_state/1/mu/out/weight"]
    names = [name for name in names if name in named(state)]
    for name, values in zip(names, inspection.read(workdir, names)):
        np.testing.assert_array_equal(values, named(state)[name])
        assert isinstance(values, np.ndarray)


def test_small_pieces_change_nothing(saved, monkeypatch):
    workdir, *_ = saved
    whole = inspection.measure(workdir)
    monkeypatch.setattr(inspection, "_PIECE", 30000)
    assert inspection.measure(workdir) == whole


def test_groups_add_up(saved):
    workdir, _, state = saved
    _, rows = inspection.table(workdir)
    groups = {group.name: group for group in inspection.groups(rows)}
    assert {"generator/params", "generator/ema/ema_1k", "generator/ema/ema_2k", "discriminator/opt_state", "step", "all"} <= groups.keys()
    assert groups["generator/params"].numbers == sum(a.size for a in jax.tree.leaves(state.generator.params))
    parts = [group for name, group in groups.items() if name != "all"]
    assert groups["all"].bytes == sum(part.bytes for part in parts) == sum(a.nbytes for a in jax.tree.leaves(state))
    text = inspection.as_text(list(groups.values()))
    assert len({len(line.rstrip()) for line in text.splitlines()[1:2]}) == 1 and "KiB" in text and "bytes per device" in text


def test_difference_of_runs(saved, tmp_path):
    workdir, experiment, state = saved
    assert inspection.largest_difference(workdir, workdir) == (0.0, max(n for n in named(state) if "/params/" in n or "/ema/" in n))
    from sim_jax import checkpoint

    name = "generator/params/out/weight"
    other = jax.tree_util.tree_map_with_path(
        lambda path, a: a * np.float32(1.5) if jax.tree_util.keystr(path, simple=True, separator="/") == name else a, state)
    with checkpoint.Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(7, sharding.place(other, experiment.shardings), {})
    difference, where = inspection.largest_difference(tmp_path, workdir)
    assert where == name and difference == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize("call, words", [
    (lambda w: inspection.table(w, "nothing_like_it"), "pattern: got 'nothing_like_it'"),
    (lambda w: inspection.table(w, "("), "pattern: got '('"),
    (lambda w: inspection.table(w, step=4), "step: got 4, allowed: 3, 7"),
    (lambda w: inspection.table(w / "no"), "which has no checkpoints"),
    (lambda w: inspection.read(w, ["generator/params/no"]), "name: got 'generator/params/no'"),
    (lambda w: gallery.open_run(w / "no"), "which has no config.json"),
    (lambda w: inspection.histogram(np.array([1.0, np.nan])), "values: got 1 of 2 that are not finite"),
])
def test_refusals_are_one_line(saved, call, words):
    with pytest.raises(ValueError) as error:
        call(saved[0])
    assert words in str(error.value) and "\n" not in str(error.value)


def test_histogram_and_heat_map():
    counts, edges = inspection.histogram(np.array([[0.0, 1.0], [1.0, 2.0]]), bins=2)
    assert counts.tolist() == [1, 3] and edges.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(inspection.heat_map(np.arange(3.0)), [[0, 1, 2]])
    np.testing.assert_array_equal(inspection.heat_map(-np.eye(3)), -np.eye(3))
    taps = np.zeros((3, 3, 2, 4))
    taps[1, 1, 0, 2], taps[0, 0, 1, 3] = 3.0, -6.0
    expected = np.zeros((2, 4))
    expected[0, 2], expected[1, 3] = 1.0, 2.0                            # 3 / sqrt(9), 6 / sqrt(9)
    np.testing.assert_allclose(inspection.heat_map(taps), expected)
    large = np.kron(np.array([[1.0, -2.0], [3.0, 4.0]]), np.ones((300, 50)))
    shown = inspection.heat_map(large, limit=100)
    assert shown.shape == (100, 100) and shown[0, 0] == 1 and shown[0, -1] == 2 and shown[-1, 0] == 3 and shown[-1, -1] == 4


@pytest.fixture(scope="module")
def run(saved):
    return gallery.open_run(saved[0])


def test_same_noise_is_that_of_the_sampler(run):
    """Left and right are what the two networks' samplers give for (seed, i) and the class."""
    teacher, generator = gallery.same_noise(run, 12, seed=4)
    classes = np.arange(12) % 10
    for drawn, pixels in ((run.teacher, teacher), (run.generator, generator)):
        expected, _ = ImageSampler(drawn.loaded.network, drawn.sampler.spec, drawn.loaded.latents(), batch_per_device=12)(
            drawn.params, seed=4, count=12, classes=classes)
        np.testing.assert_array_equal(pixels, expected)
    assert run.about["step"] == 7 and run.about["ema"] == "ema_1k" and run.generator.sampler.spec.calls == 1
    assert run.teacher.sampler.spec == SamplerSpec(num_steps=3)


def test_interpolation_ends_at_samples(run):
    """Its first and last pictures are samples 2i and 2i + 1; the noise keeps its length on the way."""
    strip = gallery.interpolation(run, pairs=3, steps=5, seed=2)
    assert strip.shape == (3, 5, 8, 8, 1)
    ends = run.generator.images(6, 2, np.repeat(np.arange(3), 2))
    # Another batch size is another program, which may round otherwise.
    np.testing.assert_allclose(strip[:, 0].astype(int), ends[::2], atol=1)
    np.testing.assert_allclose(strip[:, -1].astype(int), ends[1::2], atol=1)
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 4, 32, 32, 3))
    way = gallery.great_circle(a, b, np.linspace(0, 1, 7))
    lengths = np.linalg.norm(way.reshape(4, 7, -1), axis=-1) / 3072**0.5
    assert way.shape == (4, 7, 32, 32, 3) and np.abs(lengths - 1).max() < 0.05
    np.testing.assert_allclose(way[:, 0], a, atol=1e-12)
    np.testing.assert_allclose(way[:, -1], b, atol=1e-12)


def test_per_class_shares_noise_in_columns(run):
    grid = gallery.per_class(run, each=3, most=4, seed=5)
    assert grid.shape == (4, 3, 8, 8, 1)
    noise = np.asarray(run.generator.loaded.latents().noise(jax.random.key(5), np.arange(3, dtype=np.uint32)))
    drawn = run.generator.images(12, 5, np.repeat(np.arange(4), 3), np.tile(noise, (4, 1, 1, 1)))
    np.testing.assert_array_equal(grid.reshape(12, 8, 8, 1), drawn)
    assert gallery.per_class(run, each=3, most=4, seed=5, teacher=True).shape == grid.shape


def test_a_teacher_s_run_has_no_teacher(run):
    import dataclasses

    alone = dataclasses.replace(run, teacher=None)
    for call in (lambda: gallery.same_noise(alone, 4), lambda: gallery.interpolation(alone, teacher=True)):
        with pytest.raises(ValueError, match="allowed: a distillation"):
            call()
