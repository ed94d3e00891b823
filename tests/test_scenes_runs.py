"""configs/scenes.py by its commands, on a tiny network for two iterations: teacher, generator, report; and what they refuse."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

import runs
from sim_jax import load, main, scene_report
from sim_jax.data import captions

SMALL = ("--config.network.hidden_size=16", "--config.network.depth=1", "--config.network.num_heads=2", "--config.batch_size=8",
         "--config.total_kimg=0.016", "--config.run.log_every=1", "--config.run.probe_every=100", "--config.run.sample_every=100",
         "--config.run.save_every=2", "--config.run.grid=8", "--config.run.probe_images=8", "--config.run.panel_images=0",
         "--config.teacher.num_steps=2", "--config.run.batch_per_device=8")


def _command(words: str, workdir, *overrides: str) -> list[str]:
    flags = {flag.split("=")[0]: flag for flag in (*SMALL, *overrides)}
    return ["sim_jax.main", f"--config={runs.ROOT / 'configs' / 'scenes.py'}:{words}", f"--workdir={workdir}", *flags.values()]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("scenes") / "teacher"
    assert main.main(_command("teacher,tiny", workdir, "--config.data.max_size=64")) == 0
    return workdir


@pytest.fixture(scope="module")
def student(teacher):
    workdir = teacher.parent / "student"
    assert main.main(_command("sim,tiny", workdir, f"--config.teacher.path={teacher}")) == 0
    return workdir


def _steps(workdir) -> list[int]:
    return [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines() if "seconds" in json.loads(line)]


def test_the_teacher_trains(teacher):
    assert set(_steps(teacher)) >= {1, 2}


@pytest.mark.slow
def test_the_student_trains(student):
    assert set(_steps(student)) >= {1, 2}
    record = json.loads((student / "config.json").read_text())
    assert record["config"]["teacher"]["guidance"] > 1 and record["config"]["text"]["path"] == "builtin:scenes"
    generator = load.load_generator(student)
    images = generator.sample(prompts=["a red square", "a blue circle"], encoder="builtin:scenes")
    assert images.shape == (2, 16, 16, 3) and images.dtype == np.uint8
    assert generator.sample(text=captions.open_captions("builtin:scenes:held_out"), num=3).shape == (3, 16, 16, 3)


@pytest.mark.slow
def test_the_report_measures_both_and_the_drawings(student, tmp_path, capsys):
    out, grid = tmp_path / "scenes.json", tmp_path / "scenes.png"
    arguments = [f"--workdir={student}", "--num=100", "--steps=3", "--batch=50", f"--out={out}", f"--grid={grid}"]
    assert scene_report.main(arguments) == 0
    report = json.loads(out.read_text())
    assert report["generator"]["calls"] == 1 and report["teacher"]["calls"] == 6  # three, each guided
    perfect = {"count": 1.0, "colour": 1.0, "shape": 1.0, "relation": 1.0, "all": 1.0, "legible": 1.0}
    assert all(report["drawings"][name] == perfect for name in ("seen", "held_out_kinds", "held_out_pairs"))
    assert report["drawings"]["diversity"]["pixels"] == pytest.approx(1, abs=0.05)
    for name in ("teacher", "generator"):  # untrained networks draw no scenes
        assert report[name]["seen"]["all"] == 0 and report[name]["fd"] > 10 * report["drawings"]["fd"]
    with Image.open(grid) as picture:
        assert picture.height == len(scene_report.GRID) * 2 * (32 + 2) + 2
    assert "generator seen count" in capsys.readouterr().out


@pytest.mark.parametrize("words, overrides, message", [
    ("sim,tiny", ["--config.data.name=scenes"], "data.name: got 'scenes', allowed with method 'sim': none, it needs no images"),
    ("sim,tiny", ["--config.text.path=builtin:scene"], "text.path: got 'builtin:scene', allowed: a directory, builtin:scenes"),
    ("teacher,tiny", ["--config.network.caption_channels=16"], "data.name: got captions of 64 channels (builtin:scenes), allowed: 16"),
    ("teacher,tiny", ["--config.network.caption_tokens=4"], "got captions of 9 tokens, allowed: 4, what the network takes"),
    ("teacher,tiny", ["--config.network.img_resolution=32"], "resolution: got 16x16 images in scenes, allowed: 32x32"),
    ("teacher,tiny", ["--config.data.path=x"], "data.path: got 'x', allowed with 'scenes': max_size"),
])
def test_bad_configs_are_refused(words, overrides, message, tmp_path, capsys):
    overrides = [*overrides, "--config.teacher.path=random:0"] if words.startswith("sim") else [*overrides, "--config.data.max_size=8"]
    assert main.main(_command(words, tmp_path / "run", *overrides)) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags, message", [
    (["--num=10"], "--num: got 10, allowed: 100 or more"),
    (["--steps=4"], "--steps: got 4, allowed: odd numbers"),
    (["--out=x.txt"], "--out: got 'x.txt', allowed: a name that ends in .json"),
    (["--grid=x.jpg"], "--grid: got 'x.jpg', allowed: a name that ends in .png"),
    ([], "which has no config.json"),
])
def test_bad_report_flags_are_refused(flags, message, tmp_path, capsys):
    assert scene_report.main([f"--workdir={tmp_path}", *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_run_of_other_images_has_no_report(distilled, capsys):
    assert scene_report.main([f"--workdir={distilled}"]) == 2
    assert "a run whose images are no scenes; allowed: one of configs/scenes.py" in capsys.readouterr().err
