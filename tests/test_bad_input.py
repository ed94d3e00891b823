"""Bad input: one clear line on standard error, exit code 2, no traceback, nothing trained and nothing written."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

import runs
from sim_jax import export, images, main, sample, train


@pytest.fixture(autouse=True)
def nothing_may_be_trained(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("the run got as far as making its state")

    monkeypatch.setattr(train.experiments, "initial_state", fail)
    monkeypatch.setattr(train.checkpoint.Checkpoints, "restore", fail)
    monkeypatch.delenv("SIM_JAX_TRACEBACK", raising=False)


@pytest.fixture
def refused(capsys, tmp_path):
    """refused(words of the message ..., command) checks the whole promise; commands are `(entry point, arguments)`."""

    def check(entry, arguments: list[str], *words: str) -> None:
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        assert entry(arguments) == 2
        out, error = capsys.readouterr()
        assert error.startswith("error: ") and error.count("\n") == 1 and "Traceback" not in error, error
        for word in words:
            assert word in error, error
        assert not out and sorted(tmp_path.rglob("*")) == before

    return check


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A directory of weights that fits."""
    return runs.untrained_teacher(tmp_path_factory.mktemp("untrained") / "teacher")


@pytest.fixture
def refused_run(refused, tmp_path, teacher):
    """The same for `sim_jax.main` with a config and overrides in a workdir that does not exist."""

    def check(config, overrides, *words):
        if config.startswith("digits.py"):
            overrides = [f"--config.teacher.path={teacher}", *overrides]
        refused(main.main, runs.command(config, tmp_path / "workdir", *overrides), *words)

    return check


@pytest.mark.parametrize("overrides, words", [
    (["--config.batch_siz=64"], ["config.batch_siz: unknown key", "did you mean 'batch_size'?", "allowed in config: batch_size"]),
    (["--config.objective.distanse=l2"], ["did you mean 'objective.distance'?", "allowed in config.objective: c, distance"]),
    (["--config.network.model_chanels=8"], ["did you mean 'network.model_channels'?"]),
    (["--config.method=smi"], ["method: got 'smi', allowed: sim, ", "did you mean 'sim'?"]),
    (["--config.objective.distance=huber"], ["distance: got 'huber', allowed: pseudo_huber, squared_l2, power, l2"]),
    (["--config.objective.weighting=SiD"], ["weighting: got 'SiD', allowed:", "sid"]),
    (["--config.objective.c=-1.0"], ["c: got -1.0, allowed: 0 < c < inf"]),
    (["--config.objective.distance=squared_l2", "--config.objective.c=0.1"], ["'c'", "squared_l2"]),
    (["--config.fake_score.loss.weighting=nope"], ["weighting: got 'nope', allowed: edm"]),
    (["--config.batch_size=many"], ["config.batch_size", "many", "int"]),
    (["--config.generator.remat=maybe"], ["generator: remat: got 'maybe', allowed: none, convs, blocks"]),
    (["--config.teacher.remat=True"], ["teacher.remat: got 'True', allowed: none, convs, blocks"]),
    (["--config.data.xflip=maybe"], ["config.data.xflip", "maybe", "oolean"]),
    (["--config.generator.optimizer.lr=fast"], ["config.generator.optimizer.lr", "fast", "float"]),
    (["--config.batch_size=12"], ["batch_size: got 12 on 8 devices, allowed: a multiple of 8, such as 8 or 16"]),
    (["--config.batch_size=0"], ["batch_size: got 0, allowed: above 0"]),
    (["--config.total_kimg=nan"], ["total_kimg: got nan"]),
    (["--config.generator.optimizer.lr=nan"], ["generator.optimizer.lr: got nan"]),
    (["--config.generator.optimizer.lr=-0.1"], ["generator", "optimizer.lr: got -0.1, allowed: from 0"]),
    (["--config.generator.sigma_init=-2.5"], ["generator.sigma_init: got -2.5, allowed: above 0"]),
    (["--config.fake_score.noise.P_mean=nan"], ["fake_score.noise.P_mean: got nan"]),
    (["--config.generator.dropout=1.5"], ["generator.dropout: got 1.5, allowed: 0 or above, below 1"]),
    (["--config.run.log_every=0"], ["run.log_every: got 0, allowed: above 0"]),
    (["--config.run.eval_images=50"], ["run.eval_images: got 50, allowed: 0 (no evaluation) or at least 100"]),
    (["--config.seed=-1"], ["seed: got -1, allowed: 0 to"]),
    (["--config.ema.halflife_kimg=(-1,)"], ["ema.halflife_kimg: got (-1,)"]),
    (["--config.ema.halflife_kimg=('x',)"], ["ema.halflife_kimg: got ('x',)"]),
    (["--config.ema.halflife_kimg=(2,2.0)"], ["ema.halflife_kimg: got (2, 2.0)", "different"]),
    (["--config.network.channel_mult=()"], ["network.channel_mult: got ()"]),
    (["--config.network.num_blocks=-1"], ["network.num_blocks: got -1, allowed: above 0"]),
    (["--config.network.embedding_type=fourier"], ["config.network.embedding_type: unknown key"]),
    (["--config.labels.scheme=fair"], ["labels: got 'fair', allowed: uniform, balanced, histogram"]),
    (["--config.labels.scheme=histogram", "--config.labels.histogram=(1,2,3)"], ["histogram: got shape (3,)", "10 classes"]),
    (["--config.labels.scheme=histogram", "--config.labels.histogram=(1,1,1,1,1,1,1,1,1,-1)"], ["histogram: got", "weights >= 0"]),
    (["--config.teacher.sampler=hein"], ["teacher.sampler: got 'hein', allowed: heun, euler"]),
    (["--config.teacher.dtype=float8"], ["dtype: got 'float8', allowed: float32, bfloat16"]),
    (["--config.generator.optimizer.name=adm"], ["generator", "optimizer.name: got 'adm', allowed: adam"]),
    (["--config.generator.noise.name=log"], ["generator", "noise_level: got 'log', allowed: log_normal"]),
    (["--config.sharding.mesh=data:3"], ["sharding.mesh: got 'data:3'", "8 devices"]),
    (["--config.sharding.rules=(('.*','fspd'),)"], ["sharding.rules: got strategy 'fspd', allowed: replicate, fsdp"]),
    (["--config.sharding.rules=(('.*',3),)"], ["sharding.rules: got", "3"]),
    (["--config.run.features=inception"], ["run.features: got 'inception', allowed: digits, mnist, the directory"]),
    (["--config.network.img_resolution=16"], ["run.features: got 'digits' for images of 16x16x1, allowed", "[N,8,8,1]"]),
    (["--config.fake_score.augment_p=0.1"], ["fake_score.augment_p: got 0.1", "augment_dim 9"]),
    (["--config.data.name=digits"], ["data.name: got 'digits', allowed with method 'sim': none, it needs no images"]),
    (["--config.gan.weight=0.1"], ["data.name: got 'none', allowed with method 'sim' and an adversarial term: digits, images, scenes, tfds"]),
    (["--config.gan.weight=-0.1"], ["gan.weight: got -0.1, allowed: 0 or above"]),
    (["--config.gan.features=bottleneck"], ["gan.features: got 'bottleneck', allowed: fake_score, teacher"]),
    (["--config.gan.pairing=same"], ["gan.pairing: got 'same', allowed: own, score, shared"]),
    (["--config.gan.weight=1.0", "--config.data.name=digits", "--config.gan.resolutions=(64,)"], ["gan.resolutions: got (64,), allowed:"]),
    (["--config.gan.weight=1.0", "--config.data.name=digits", "--config.gan.head=linear"], ["gan.head: got 'linear', allowed: conv, mean"]),
    (["--config.gan.weight=1.0", "--config.data.name=digits", "--config.gan.optimizer.lr=-1.0"], ["gan: optimizer.lr: got -1.0"]),
    (["--config.generator.sigmas=(1.0,2.5)"], ["generator.sigmas: got (1.0, 2.5), allowed: one or more falling noise levels above 0"]),
    (["--config.generator.sigmas=(2.5,1.0)", "--config.generator.sigma_cond=1.0"], ["generator.sigma_cond: got 1.0 with 2 steps"]),
    (["--config.generator.sigmas=(2.5,1.0,0.5)"], ["batch_size: got 16 on 8 devices with a generator of 3 steps", "multiple of 24"]),
    (["--config.generator.inputs=noised"], ["generator.inputs: got 'noised', allowed: simulated, data"]),
    (["--config.generator.sigmas=(2.5,1.0)", "--config.generator.inputs=data"], ["data.name: got 'none'"]),
    (["--config.fake_score.turns=other"], ["fake_score.turns: got 'other' with fake_score.updates 1, allowed: 'every'"]),
    (["--config.fake_score.images=same"], ["fake_score.images: got 'same', allowed: fresh, shared"]),
    (["--config.teacher.guidance=2.0"], ["teacher.guidance: got 2, allowed: 1, or with a class- or text-conditional teacher trained with label"]),
    (["--config.fake_score.guidance=2.0"], ["fake_score.guidance: got 2, allowed: 1"]),
    (["--config.teacher.guidance_interval=(3.0,)"], ["teacher.guidance_interval: got (3.0,), allowed: (sigma_lo, sigma_hi) or ()"]),
    (["--config.regression.weight=1.0", "--config.regression.distance=lpips"], ["regression.distance: got 'lpips', allowed: pseudo_huber"]),
    (["--config.regression.num_pairs=0"], ["regression.num_pairs: got 0, allowed: above 0"]),
    (["--config.data.path=cifar.zip"], ["data.path: got 'cifar.zip'"]),
    (["--workdri=x"], ["workdri", "workdir"]),
    (["stray"], ["arguments: got 'stray'"]),
])
def test_a_wrong_value(refused_run, overrides, words):
    refused_run("digits.py", overrides, *words)


@pytest.mark.parametrize("config, words", [
    ("digits.py:bogus", ["digits.py: config argument: got 'bogus', allowed:", "{full,tiny}"]),
    ("cifar10.py:cond,bogus", ["config argument: got 'bogus'"]),
    ("nothing.py", ["--config: got", "nothing.py is no Python file"]),
    ("../setup.cfg", ["--config: got"]),
    ("../sim_jax/types.py", ["--config:", "no attribute 'get_config'"]),
])
def test_a_wrong_config_file(refused_run, config, words):
    refused_run(config, [], *words)


def test_missing_flags(refused, tmp_path):
    whole = runs.command("digits.py", tmp_path / "workdir")
    refused(main.main, [a for a in whole if not a.startswith("--config=")], "--config: missing; usage: python -m sim_jax.main")
    refused(main.main, [a for a in whole if not a.startswith("--workdir")], "--workdir: missing; usage: python -m sim_jax.main")


def test_teachers(refused_run, teacher, tmp_path):
    def path(path, *words, more=()):
        refused_run("digits.py", [f"--config.teacher.path={path}", *more], *words)

    path(tmp_path / "none", "none: not found; expected a directory with network.json")
    path("builtin:nothing", "teacher.path: got 'builtin:nothing', allowed:")
    path("random:x", "teacher.path: got 'random:x'")
    path(teacher, "teacher.path:", "is another network than config.network", "model_channels: 8 != 16",
            more=["--config.network.model_channels=16"])
    path(teacher, "ema: got 'ema_1k'", "allowed only with a workdir", more=["--config.teacher.ema=ema_1k"])
    empty = tmp_path / "empty"
    empty.mkdir()
    path(empty, "empty: no network.json there")


@pytest.mark.parametrize("damage, words", [
    (lambda data: data[: len(data) // 2], ["params.safetensors"]),
    (lambda data: data[:4], ["params.safetensors"]),
    (lambda data: b"", ["params.safetensors"]),
    (lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], ["params.safetensors", "hash"]),
])
def test_damaged_teacher_files(refused_run, teacher, tmp_path, damage, words):
    copy = tmp_path / "copy"
    shutil.copytree(teacher, copy)
    file = copy / "params.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    refused_run("digits.py", [f"--config.teacher.path={copy}"], *words)


def test_a_teacher_whose_description_is_no_json(refused_run, teacher, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(teacher, copy)
    (copy / "network.json").write_text("{")
    refused_run("digits.py", [f"--config.teacher.path={copy}"], "network.json: not JSON")


def test_a_network_that_cannot_be(refused_run):
    refused_run("digits_teacher.py", ["--config.network.model_channels=30"], "network.model_channels: gives a layer of 30 channels")
    refused_run("digits_teacher.py", ["--config.network.channel_mult=(1,1,1,1,1)"], "network.img_resolution: got 8", "multiple of 16")


def test_a_teacher_is_needed_and_a_teacher_needs_images(refused_run):
    refused_run("cifar10.py", ["--config.batch_size=16"], "teacher.path: got nothing, but method 'sim' needs a teacher")
    refused_run("digits_teacher.py", ["--config.data.name=none"], "data.name: got 'none', allowed with method 'dsm': digits, images, scenes, tfds")
    refused_run("digits_teacher.py", ["--config.data.name=images"], "data.path: got nothing")
    refused_run("digits_teacher.py", ["--config.data.name=imags"], "data: got 'imags', allowed: digits, images, scenes, tfds")


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(file, "png")
    return file.getvalue()


@pytest.fixture
def archive(tmp_path):
    """archive(change) writes 12 labelled grey 8x8 images as EDM's zip; `change(files)` spoils {name: bytes} first."""

    def make(change=lambda files: None):
        pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1), np.uint8)
        path = images.save_samples(tmp_path / "good.zip", pixels, np.arange(12) % 10)
        with zipfile.ZipFile(path) as file:
            files = {name: file.read(name) for name in file.namelist()}
        change(files)
        with zipfile.ZipFile(tmp_path / "data.zip", "w") as file:
            for name, content in files.items():
                file.writestr(name, content)
        return tmp_path / "data.zip"

    return make


def _relabel(change):
    def apply(files):
        table = json.loads(files["dataset.json"])
        change(table)
        files["dataset.json"] = json.dumps(table).encode()

    return apply


@pytest.mark.parametrize("change, words", [
    (lambda files: files.update({"00000/img00000005.png": _png(np.zeros((16, 16, 1), np.uint8))}), ["16x16", "img00000005.png", "8x8"]),
    (lambda files: files.update({"00000/img00000005.png": _png(np.zeros((8, 8, 3), np.uint8))}), ["3 channels", "img00000005.png"]),
    (lambda files: files.update({"00000/img00000005.png": b"no picture"}), ["img00000005.png", "not a PNG or JPEG"]),
    (_relabel(lambda table: table["labels"].pop()), ["dataset.json", "lacks 1 of 12 images", "img00000011.png"]),
    (_relabel(lambda table: table["labels"].append(["00000/img99999999.png", 1])), ["1 entries without an image", "img99999999"]),
    (_relabel(lambda table: table["labels"].append(table["labels"][0])), ["img00000000.png' twice"]),
    (_relabel(lambda table: table["labels"][3].__setitem__(1, 12)), ["got class 12 for", "img00000003.png", "allowed: 0 to 9"]),
    (lambda files: files.update({"dataset.json": b"{"}), ["dataset.json", "not valid JSON"]),
    (lambda files: files.pop("dataset.json"), ["label_dim: got 10, allowed: 0"]),
])
def test_images_and_labels(refused_run, archive, change, words):
    refused_run("digits_teacher.py", ["--config.data.name=images", f"--config.data.path={archive(change)}"], *words)


def test_a_truncated_zip(refused_run, archive):
    path = archive()
    path.write_bytes(path.read_bytes()[:-100])
    refused_run("digits_teacher.py", ["--config.data.name=images", f"--config.data.path={path}"], "data.zip", "truncated or corrupt")


def test_images_of_another_resolution_than_the_network(refused_run, archive):
    overrides = ["--config.data.name=images", f"--config.data.path={archive()}", "--config.network.img_resolution=16",
                 "--config.run.features=none"]
    refused_run("digits_teacher.py", overrides, "resolution: got 8x8 images", "allowed: 16x16")


def test_workdirs(refused, teacher, tmp_path):
    def workdir(path, *words):
        refused(main.main, runs.command("digits.py", path, f"--config.teacher.path={teacher}"), *words)

    file = tmp_path / "file"
    file.write_text("mine")
    workdir(file, "workdir: got", "allowed: a folder that can be written")
    workdir(file / "below", "workdir: got")
    workdir("/proc/nothing/here", "workdir: got '/proc/nothing/here', allowed: a folder that can be written")
    assert file.read_text() == "mine"
    foreign = tmp_path / "foreign"
    (foreign / "checkpoints").mkdir(parents=True)
    workdir(foreign, "holds checkpoints but no config.json")


def test_a_workdir_of_another_config(refused, distilled, teacher_dir):
    before = {p: p.read_bytes() for p in distilled.rglob("*") if p.is_file()}
    refused(main.main, runs.command("digits.py", distilled, f"--config.teacher.path={teacher_dir}", "--config.batch_size=32"),
            "belongs to another config: batch_size: 16 -> 32")
    refused(main.main, runs.command("digits_teacher.py", distilled), "belongs to another config", "and", "more")
    assert {p: p.read_bytes() for p in distilled.rglob("*") if p.is_file()} == before


def test_sampling(refused, distilled, teacher_dir, tmp_path):
    def samples(arguments, *words):
        refused(sample.main, [f"--out={tmp_path / 'x.png'}", f"--workdir={distilled}", *arguments], *words)

    samples(["--classes=12"], "classes: got 12, allowed: 0 to 9")
    samples(["--classes=3-"], "classes: got '3-'")
    samples(["--num=0"], "--num: got 0, allowed: 1 or more")
    samples(["--batch=0"], "--batch: got 0, allowed: 1 or more")
    samples(["--seed=-1"], "--seed: got -1, allowed: 0 to")
    samples(["--steps=4"], "--steps: got 4, allowed: 1, this is a one-step generator")
    samples(["--teacher", "--steps=4"], "--steps: got 4, allowed: odd numbers")
    samples(["--teacher", "--steps=-3"], "--steps: got -3, allowed: odd numbers")
    samples(["--teacher", "--churn=-1"], "S_churn: got -1")
    samples(["--churn=5"], "--churn")
    samples(["--ema=ema_3k"], "ema: got 'ema_3k', allowed: ema_2k, raw")
    samples([f"--out={tmp_path / 'x.bmp'}"], "out: got", "x.bmp", ".png, .npz, .zip")
    samples([f"--workdir={tmp_path / 'none'}"], "--workdir: got", "has no config.json")
    refused(sample.main, [f"--weights={teacher_dir}", "--teacher", "--out=x.png"], "--teacher: allowed only with --workdir")
    refused(sample.main, [f"--weights={tmp_path / 'none'}", f"--out={tmp_path / 'x.png'}"], "not found")


def test_exporting(refused, distilled, tmp_path):
    out = f"--out={tmp_path / 'x.safetensors'}"
    refused(export.main, [f"--workdir={tmp_path}", out], "--workdir: got", "has no config.json")
    refused(export.main, [f"--workdir={distilled}", out, "--ema=best"], "ema: got 'best', allowed: ema_2k, raw")
    file = tmp_path / "file"
    file.write_text("mine")
    refused(export.main, [f"--workdir={distilled}", f"--out={file}"], "out: got")
    assert file.read_text() == "mine"


@pytest.mark.parametrize("entry", [sample, export])
def test_flags_that_are_wrong_or_missing(entry, capsys):
    for arguments in ([], ["--nothing"]):
        with pytest.raises(SystemExit) as stop:
            entry.main(arguments)
        assert stop.value.code == 2
        assert "Traceback" not in capsys.readouterr().err


def test_from_the_shell(tmp_path):
    """The same as a process: the code reaches the shell and nothing else is printed."""
    command = [sys.executable, "-m", *runs.command("digits.py", tmp_path / "workdir", "--config.batch_siz=3")]
    done = subprocess.run(command, cwd=runs.ROOT, env={**os.environ, "PYTHONPATH": str(runs.ROOT)}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: config.batch_siz: unknown key (did you mean 'batch_size'?)")
    assert not (tmp_path / "workdir").exists()
