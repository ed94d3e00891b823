"""The comparison table: how it is written, what it refuses, and that it goes on where it stopped."""

import json

import pytest

import runs
from sim_jax import table

CONFIG = str(runs.ROOT / "configs" / "digits.py")


def result(words, seed, fd):
    return {"words": words, "seed": seed, "steps": 300, "flops": 64e6, "seconds": 60.0, "calls": 1, "batch_size": 64, "fd": fd,
            "class_agreement": 0.98, "precision": 0.8, "recall": 0.9, "count": 5000, "reference_count": 1797, "features": "digits:abc",
            "noise_floor": 0.13}


def test_rows_are_means_with_spreads():
    results = {(r["words"], r["seed"]): r for r in (result("sim", 0, 0.2), result("sim", 1, 0.4), result("dmd2,gan", 0, 0.1))}
    page = table.table(results, ["sim", "dmd2,gan"], command="python -m sim_jax.table", device="a machine",
                       teacher={"calls": 35, "fd": 0.138, "class_agreement": 0.984, "precision": 0.83, "recall": 0.94})
    assert "| `sim` | 1 | 300 | 1.0 | 60 | 0.300 ± 0.141 | 98.0% | 0.80 | 0.90 |" in page
    assert "| `dmd2,gan` | 1 | 300 | 1.0 | 60 | 0.100 | 98.0% | 0.80 | 0.90 |" in page
    assert "| teacher | 35 | | | | 0.138 | 98.4% | 0.83 | 0.94 |" in page
    assert "python -m sim_jax.table" in page and "a machine" in page and "about 0.130" in page


@pytest.mark.parametrize("flags, words", [
    (["--seeds=a"], "--seeds, --part: got 'a'"), (["--part=2/2"], "I below N"), (["--part=1"], "--part"), (["--steps=0"], "1 step or more"),
    (["--rows=sin"], "config argument: got 'sin', allowed"),
])
def test_bad_input_is_one_line(tmp_path, capsys, flags, words):
    code = table.main([f"--config={CONFIG}", f"--workdir={tmp_path / 'w'}", f"--out={tmp_path / 't.md'}", *flags])
    error = capsys.readouterr().err
    assert code == 2 and words in error and "Traceback" not in error and not (tmp_path / "t.md").exists()


def test_finished_rows_are_not_trained_again(tmp_path, monkeypatch):
    """All results are there: the table is written without training anything."""
    workdir = tmp_path / "w"
    workdir.mkdir()
    (workdir / "results0.jsonl").write_text(json.dumps(result("sim", 0, 0.2)) + "\n")
    (workdir / "results1.jsonl").write_text(json.dumps(result("sid", 0, 0.3)) + "\n")
    (workdir / "teacher.json").write_text(json.dumps({"calls": 35, "fd": 0.1, "class_agreement": 1.0, "precision": 1.0, "recall": 1.0}))
    monkeypatch.setattr(table, "_flops", lambda *args: 1.0)
    monkeypatch.setattr(table, "_train", lambda *args: pytest.fail("trained"))
    out = tmp_path / "t.md"
    assert table.main([f"--config={CONFIG}", "--rows=sim sid", "--seeds=0", f"--workdir={workdir}", f"--out={out}"]) == 0
    assert "| `sid` |" in out.read_text()


def test_the_shipped_rows_are_configs():
    from sim_jax import config_file

    module = config_file.load_module(CONFIG)
    for words in module.TABLE:
        module.get_config(words)
    assert {"sim", "dmd2", "sim,gan", "dmd2,4,gan"} <= set(module.TABLE)
