"""A teacher trained, distilled, sampled and exported by the commands of the README, on a tiny network: what a user finds afterwards."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import pytest
from PIL import Image

import runs
import sim_jax
from sim_jax import config_file, export, load, metrics, sample, weights
from sim_jax.data import images as image_data

STEPS, KIMG = 8, 0.128


@pytest.fixture(scope="module")
def generator_file(distilled):
    """The distilled generator as one file."""
    file = distilled.parent / "generator.safetensors"
    assert export.main([f"--workdir={distilled}", f"--out={file}"]) == 0
    return file


def test_the_workdir_holds_what_is_promised(distilled):
    assert (distilled / "report.html").stat().st_size > 10_000
    assert list((distilled / "tensorboard").glob("events.out.tfevents.*"))
    assert sorted(int(p.name) for p in (distilled / "checkpoints").iterdir()) == [4, 8]
    names = sorted(p.name for p in (distilled / "samples").iterdir())
    assert names == ["step_00000000.png", "step_00000004.png", "step_00000008.png", "teacher.png"]
    record = json.loads((distilled / "config.json").read_text())
    assert record["config"]["method"] == "sim" and record["config"]["batch_size"] == 16
    assert "--config.batch_size=16" in record["overrides"]
    assert record["versions"]["jax"] and "--config.batch_size=16" in record["command"]


def test_metrics_have_a_line_a_step_with_figures_that_mean_something(distilled):
    rows = metrics.read_metrics(distilled)
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    assert rows[-1]["kimg"] == pytest.approx(KIMG)
    for row in rows[1:]:
        assert {"generator/loss", "generator/grad_norm", "fake_score/loss", "fake_score/grad_norm", "seconds"} <= row.keys()
    assert [row["step"] for row in rows if "fake_score/lag" in row] == [2, 4, 6, 8]
    assert sum(name.startswith("divergence/sigma") for name in rows[-1]) == 6
    assert [row["step"] for row in rows if "samples/mean" in row] == [0, 4, 8]
    assert {"samples/mean_reference", "samples/std", "samples/diversity"} <= rows[0].keys()
    # Fake score and teacher start as one network, so the divergence is small first and grows as the critic sees the generator.
    first, last = ([row[n] for n in sorted(row) if n.startswith("divergence/")] for row in (rows[2], rows[-1]))
    assert all(np.isfinite(first + last)) and sum(last) > sum(first) > 0


def test_the_report_compares_teacher_generator_and_real_images(distilled):
    report = json.loads((distilled / "report.json").read_text())
    assert report["teacher"]["calls"] == 5 and report["generator"]["calls"] == 1
    for role in ("teacher", "generator"):
        assert report[role]["fd"] > report["real_halves"]["fd"] > 0
        assert 0 <= report[role]["class_agreement"] <= 1
    assert 0 < report["seconds"]["to_first_step"] <= report["seconds"]["total"]
    assert "8 devices" in report["device"]
    assert report["steps"] == STEPS and report["kimg"] == pytest.approx(KIMG)
    assert report["protocol"]["count"] == 100 and report["protocol"]["reference_count"] == 1797


def test_the_teacher_s_report_has_a_teacher_only(teacher_workdir):
    report = json.loads((teacher_workdir / "report.json").read_text())
    assert report["teacher"]["fd"] > 0 and "generator" not in report
    rows = metrics.read_metrics(teacher_workdir)
    assert all("denoiser/loss" in row for row in rows[1:]) and not any("generator/loss" in row for row in rows)


def test_samples_are_the_same_whatever_the_format_the_batch_and_the_number(distilled, tmp_path, capsys):
    common = [f"--workdir={distilled}", "--seed=5", "--classes=0,3"]
    for out, more in (("x.npz", ["--num=9"]), ("small.npz", ["--num=4", "--batch=3"]), ("x.zip", ["--num=9"]), ("x.png", ["--num=9"])):
        assert sample.main([*common, *more, f"--out={tmp_path / out}"]) == 0
    assert "1 network call each" in capsys.readouterr().out
    with np.load(tmp_path / "x.npz") as file:
        pixels, labels = file["images"], file["labels"]
    assert pixels.dtype == np.uint8 and pixels.shape == (9, 8, 8, 1)
    assert labels.dtype == np.int32 and labels.tolist() == [0, 3, 0, 3, 0, 3, 0, 3, 0]
    with np.load(tmp_path / "small.npz") as file:
        np.testing.assert_array_equal(file["images"], pixels[:4])
    source = image_data.open_images(tmp_path / "x.zip", label_dim=10)
    np.testing.assert_array_equal(np.stack([source[i]["image"] for i in range(9)]), pixels)
    assert [source[i]["label"] for i in range(9)] == labels.tolist()
    with zipfile.ZipFile(tmp_path / "x.zip") as archive:
        assert "00000/img00000000.png" in archive.namelist() and "dataset.json" in archive.namelist()
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.text["calls"] == "1" and picture.text["seed"] == "5"


def test_other_seeds_and_drawn_classes_give_other_images(distilled):
    generator = sim_jax.load_generator(distilled)
    first, again, other = generator.sample(12, seed=0), generator.sample(12, seed=0), generator.sample(12, seed=1)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any(axis=(1, 2, 3)).all()
    assert len(np.unique(first.reshape(12, -1), axis=0)) == 12


def test_an_exported_file_gives_the_workdir_s_images(distilled, generator_file):
    ours, exported = sim_jax.load_generator(distilled), sim_jax.load_generator(generator_file)
    np.testing.assert_array_equal(ours.sample(16, seed=3), exported.sample(16, seed=3))
    np.testing.assert_array_equal(ours.sample(4, class_labels=7), exported.sample(4, class_labels=[7, 7, 7, 7]))
    assert exported.loaded.sigma_init == 2.5 and exported.loaded.origin["step"] == STEPS


def test_the_averages_of_a_workdir_are_different_networks(distilled):
    default, named, raw = (sim_jax.load_generator(distilled, ema=name) for name in (None, "ema_2k", "raw"))
    assert default.loaded.origin["ema"] == "ema_2k" and raw.loaded.origin["ema"] == "raw"
    weights = [g.loaded.params["enc"]["8x8_conv"]["weight"] for g in (default, named, raw)]
    np.testing.assert_array_equal(weights[0], weights[1])
    assert (weights[0] != weights[2]).any()


def test_the_generator_has_left_its_teacher(distilled, teacher_dir):
    teacher = sim_jax.load_generator(teacher_dir)
    assert teacher.loaded.sigma_init is None and teacher.sampler.spec.calls == 35
    generator = sim_jax.load_generator(distilled, ema="raw")
    assert (generator.loaded.params["enc"]["8x8_conv"]["weight"] != teacher.loaded.params["enc"]["8x8_conv"]["weight"]).any()


def test_the_teacher_of_a_workdir_and_its_exported_weights_sample_alike(distilled, teacher_dir, teacher_workdir, tmp_path):
    sources = ([f"--workdir={distilled}", "--teacher"], [f"--weights={teacher_dir}"], [f"--workdir={teacher_workdir}"])
    pixels = []
    for i, source in enumerate(sources):
        assert sample.main([*source, "--num=5", "--steps=5", f"--out={tmp_path / f'{i}.npz'}"]) == 0
        with np.load(tmp_path / f"{i}.npz") as file:
            pixels.append(file["images"])
    np.testing.assert_array_equal(pixels[0], pixels[1])
    np.testing.assert_array_equal(pixels[0], pixels[2])


def test_a_plain_import_reaches_the_promised_names(generator_file):
    assert callable(sim_jax.objectives.get("sim").pair_loss)
    file = load.load(generator_file)
    from safetensors.numpy import load_file

    denoise, params = sim_jax.convert.edm.load_state(load_file(generator_file), file.network.spec)
    x = np.zeros((2, 8, 8, 1), np.float32)
    out = denoise(params, x, np.ones(2, np.float32), class_labels=np.eye(10, dtype=np.float32)[:2])
    assert out.shape == (2, 8, 8, 1) and bool(np.isfinite(out).all())
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        sim_jax.nonsense  # noqa: B018


def test_real_images_train_a_teacher(shared_dir, tmp_path):
    """The EDM recipe at its smallest, on CIFAR-10's images with augmentation."""
    overrides = [f"--config.data.path={shared_dir / 'data' / 'cifar10-32x32.zip'}", "--config.data.max_size=64",
                 "--config.total_kimg=0.032", "--config.run.features=none"]
    workdir = tmp_path / "run"
    assert runs.train("cifar10_teacher.py:tiny", workdir, *overrides) == 0
    rows = metrics.read_metrics(workdir)
    assert rows[-1]["step"] == 2 and np.isfinite(rows[-1]["denoiser/loss"])


def test_the_shipped_teacher_is_the_one_that_the_quick_start_asks_for():
    from sim_jax import networks

    config = config_file.load(str(runs.ROOT / "configs" / "digits.py"))
    loaded = load.load("builtin:digits")
    assert config.teacher.path == "builtin:digits"
    assert networks.differences(loaded.network.spec, config.network.to_dict()) == []


def test_the_best_generator_is_kept(distilled, tmp_path):
    """best.safetensors loads like any generator, and records the figure that report.json has."""
    kept = load.load(distilled / "best.safetensors")
    report = json.loads((distilled / "report.json").read_text())
    assert kept.sigma_init == 2.5 and kept.origin["ema"] == report["protocol"]["ema"]
    recorded = weights.read_header(str(distilled / "best.safetensors"))["figures"]["generator"]["fd"]
    assert recorded == pytest.approx(report["generator"]["fd"], rel=1e-6)
    out = tmp_path / "best.npz"
    assert sample.main([f"--weights={distilled / 'best.safetensors'}", "--num=4", f"--out={out}"]) == 0
    assert np.load(out)["images"].shape == (4, 8, 8, 1)
