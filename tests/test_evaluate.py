"""The command: what it measures, what it writes, what it refuses, and that a kill leaves nothing half-written."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import runs
from sim_jax import evaluate, images, networks
from sim_jax import weights as weight_files
from sim_jax.data import digits

SMALL = ("--num=60", "--steps=3", "--batch=8")


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """An untrained teacher whose network compiles in a moment."""
    folder = runs.untrained_teacher(tmp_path / "weights")
    runs.use_pixel_networks(monkeypatch)
    network = networks.build(weight_files.read_header(str(folder))["network"])
    params = jax.tree.map(np.asarray, network.init(jax.random.key(0)))
    monkeypatch.setattr(weight_files, "load", lambda path, **_: (network, params, {"hash": "0" * 64, "labels": {}}))
    return str(folder)


@pytest.fixture
def samples(tmp_path):
    real = digits.load()
    path = tmp_path / "samples.npz"
    images.save_samples(path, real.images[:200], real.labels[:200])
    return str(path)


def _json(path):
    return json.loads(pathlib.Path(path).read_text())


def test_anybody_s_images(tmp_path, samples, capsys):
    out = tmp_path / "new" / "out.json"
    assert evaluate.main([f"--images={samples}", f"--out={out}", "--metrics=fid,pr,class,nearest"]) == 0
    got, shown = _json(out), capsys.readouterr()
    assert got["protocol"]["count"] == 200 and got["protocol"]["reference_origin"] == "digits" and got["copies"] == 200
    assert got["precision"] == 1.0 and got["class_agreement"] > 0.98 and 0 < got["fd"] < 10
    assert f"{got['fd']:.4g}" in shown.out and got["protocol"]["features"] in shown.out and got["protocol"]["reference"] in shown.out
    assert "200/200 images" in shown.err and got["command"].startswith("python -m sim_jax.evaluate --images=")
    assert (out.parent / "out_nearest.png").is_file() and len(list(out.parent.iterdir())) == 2


def test_weights_by_a_protocol(tmp_path, weights, capsys):
    assert evaluate.main([f"--weights={weights}", *SMALL, "--protocol=edm", "--metrics=fd,is", f"--out={tmp_path / 'o.json'}"]) == 0
    got, shown = _json(tmp_path / "o.json"), capsys.readouterr().out
    assert got["protocol"]["samples"] == ["0-59", "60-119", "120-179"] and got["fd"] == min(run["fd"] for run in got["details"]["runs"])
    for part in ("edm, but with count 60", "0-59, 60-119, 120-179", "label scheme uniform", "clip(x * 127.5 + 128)", "heun, 2 steps",
                 "3 network calls", "ema none", "digits_classifier:", got["protocol"]["reference"]):
        assert part in shown, part


def test_a_comparison(tmp_path, weights, samples, capsys):
    earlier = tmp_path / "earlier.json"
    assert evaluate.main([f"--images={samples}", f"--out={earlier}", "--metrics=fd"]) == 0
    capsys.readouterr()
    for suffix in ("html", "png", "json"):
        assert evaluate.main(["--compare", weights, samples, str(earlier), *SMALL, "--metrics=fd", f"--out={tmp_path / 'c'}.{suffix}"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("|") and "FD ↓" in lines[0]
        assert [line.split("|")[1].strip() for line in lines[2:5]] == [weights, samples, samples]
        assert lines[6].startswith("Not the same in all rows: ")
    page = (tmp_path / "c.html").read_text()
    assert page.count("<tr><th>") == 1 + 3 and "data:image/png;base64" in page and "http" not in page.replace("http-equiv", "")
    picture = np.asarray(Image.open(tmp_path / "c.png"))
    assert picture.shape[0] == 2 * 49 + 1                     # two rows of 8-pixel digits, six times as large
    assert [entry["name"] for entry in _json(tmp_path / "c.json")["entries"]] == [weights, samples, samples]


def test_a_reference_is_written_and_used(tmp_path, samples):
    path = tmp_path / "digits.npz"
    assert evaluate.main(["--reference=digits", f"--write-reference={path}", "--metrics=fd,pr,class"]) == 0
    tables = []
    for reference in ("digits", path):
        assert evaluate.main([f"--images={samples}", f"--reference={reference}", "--metrics=fd,pr", f"--out={tmp_path / 'o.json'}"]) == 0
        tables.append({key: value for key, value in _json(tmp_path / "o.json").items() if key not in ("command", "seconds")})
    assert tables[0] == tables[1]


def test_a_subset_of_the_images(tmp_path, samples):
    figures = []
    for seed in (0, 0, 1):
        assert evaluate.main([f"--images={samples}", "--num=50", f"--seed={seed}", "--metrics=fd", f"--out={tmp_path / 'o.json'}"]) == 0
        figures.append(_json(tmp_path / "o.json"))
    assert figures[0]["fd"] == figures[1]["fd"] != figures[2]["fd"] and figures[0]["protocol"]["count"] == 50


def _bad(tmp_path):
    """Files of the wrong kind, by name."""
    real = digits.load().images
    np.savez(tmp_path / "nan.npz", images=np.where(np.arange(4)[:, None, None, None] == 1, np.nan, np.zeros((4, 8, 8, 1))))
    np.savez(tmp_path / "colour.npz", images=np.zeros((5, 8, 8, 3), np.uint8))
    np.savez(tmp_path / "one.npz", images=real[:1])
    np.savez(tmp_path / "three.npz", images=real[:3])
    np.savez(tmp_path / "inception.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez(tmp_path / "foreign.npz", weights=np.zeros(3))
    (tmp_path / "text.npz").write_text("no zip")
    (tmp_path / "x.json").write_text("[1]")


@pytest.mark.parametrize("arguments, message", [
    ("--images=missing.npz", "does not exist"), ("--images=nan.npz", "1 of 4 images with NaN"),
    ("--images=colour.npz --features=digits", "8x8x3"), ("--images=colour.npz", "--features: got nothing"),
    ("--images=one.npz", "got 1 in one.npz, allowed: 2"), ("--images=three.npz --metrics=pr", "N > 3"),
    ("--images=three.npz --num=4", "got 3 images in three.npz, allowed: 4"), ("--images=digits --metrics=fidd", "metrics: got 'fidd'"),
    ("--images=digits --reference=missing.npz", "reference: got 'missing.npz', which does"),
    ("--images=digits --reference=inception.npz --metrics=fd", "2048 features"),
    ("--images=digits --reference=foreign.npz", "with weights"), ("--images=digits --reference=text.npz", "truncated or corrupt"),
    ("--images=digits --features=mnist", "28,28,1"), ("--images=digits --features=nowhere", "features: got 'nowhere'"),
    ("--images=digits --protocol=edm", "--protocol: allowed for"), ("--weights=builtin:digits --protocol=fid", "protocol: got 'fid'"),
    ("--weights=builtin:cats", "builtin:cats"), ("--workdir=.", "config.json"), ("--images=digits --num=1", "num: got 1"),
    ("--images=digits --out=x.txt", "--out: got 'x.txt'"), ("", "nothing to do"), ("--compare x.json", "allowed: a .json that --out"),
    ("--compare nowhere", "does not exist"), ("--write-reference=r.npz", "--reference"),
    ("--reference=digits --write-reference=r.txt", "write-reference: got 'r.txt'"), ("--weights=builtin:digits --ema=x", "ema: got 'x'"),
    ("--weights=builtin:digits --steps=2", "odd numbers"),
])
def test_bad_input_is_one_line_and_code_two(tmp_path, monkeypatch, capsys, arguments, message):
    _bad(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir())
    assert evaluate.main(arguments.split()) == 2
    shown = capsys.readouterr().err.splitlines()
    assert shown[-1].startswith("error: ") and message in shown[-1] and not any("Traceback" in line for line in shown)
    assert sorted(os.listdir()) == before


def test_killed_half_way_it_leaves_the_old_file_and_starts_again(tmp_path, samples):
    real = digits.load()
    images.save_samples(tmp_path / "many.npz", np.tile(real.images, (20, 1, 1, 1)))
    out = tmp_path / "o.json"
    out.write_text("the old one")
    command = [sys.executable, "-m", "sim_jax.evaluate", f"--images={tmp_path / 'many.npz'}", "--metrics=fd,pr,kd", f"--out={out}"]
    process = subprocess.Popen(command, cwd=runs.ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(runs.ROOT)})
    before = sorted(os.listdir(tmp_path))
    for line in process.stderr:
        if "images (" in line and "many" in line:
            break
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and out.read_text() == "the old one" and sorted(os.listdir(tmp_path)) == before
    assert evaluate.main([f"--images={samples}", "--metrics=fd", f"--out={out}"]) == 0 and _json(out)["protocol"]["count"] == 200


def test_the_workdir_of_a_run(distilled, tmp_path, capsys):
    for ema in ("ema_2k", "raw"):
        flags = ["--num=50", "--batch=8", f"--ema={ema}", "--metrics=fd", f"--out={tmp_path / ema}.json"]
        assert evaluate.main([f"--workdir={distilled}", *flags]) == 0
    got = [_json(tmp_path / f"{ema}.json") for ema in ("ema_2k", "raw")]
    assert got[0]["fd"] != got[1]["fd"] and [entry["protocol"]["ema"] for entry in got] == ["ema_2k", "raw"]
    assert "ema raw; step 8" in capsys.readouterr().out and got[0]["protocol"]["sampler"].startswith("1 network call at sigma")
