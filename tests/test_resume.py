"""A run that was stopped, however and whenever, and repeated ends bit-identical to the one that was not."""

from __future__ import annotations

import json
import shutil
import signal

import jax
import numpy as np
import pytest

import runs
from sim_jax import metrics, train

# Every generator of randomness is in use: dropout, classes, noise; two micro-batches; a schedule that looks at the step.
RANDOM = ("--config.generator.dropout=0.1", "--config.fake_score.dropout=0.1", "--config.max_batch_per_device=1",
          "--config.run.eval_images=0", "--config.run.features=none", "--config.run.probe_every=7", "--config.run.sample_every=5")


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module", autouse=True)
def small_programs(patch):
    """Each run traces and compiles the same programs anew."""
    runs.use_pixel_networks(patch)
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


def _rows(workdir) -> list[dict[str, float]]:
    """metrics.jsonl but for what a clock measured."""
    return [{k: v for k, v in row.items() if k not in runs.TIMES} for row in metrics.read_metrics(workdir)]


def _assert_same_end(workdir, reference, step: int) -> None:
    got, expected = runs.saved_state(workdir, step), runs.saved_state(reference, step)
    assert got.keys() == expected.keys() and len(got) > 15
    for name in expected:
        assert got[name].dtype == expected[name].dtype and got[name].tobytes() == expected[name].tobytes(), name
    assert _rows(workdir) == _rows(reference)


def _stop_at(monkeypatch, steps: list[int], number: int) -> None:
    """Sends this process a signal when the progress bar reaches each of `steps` for the first time."""
    update, left = train.ProgressBar.update, list(steps)

    def stopping(self, step, *args):
        update(self, step, *args)
        if left and step == left[0]:
            left.pop(0)
            signal.raise_signal(number)

    monkeypatch.setattr(train.ProgressBar, "update", stopping)


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    """What all distillations here have in common."""
    return (*RANDOM, f"--config.teacher.path={runs.untrained_teacher(tmp_path_factory.mktemp('untrained') / 'teacher')}")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, overrides):
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert runs.train("digits.py", workdir, *overrides) == 0
    return workdir


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_twice_at_steps_that_are_no_checkpoints(uninterrupted, overrides, tmp_path, monkeypatch, capsys, number, code):
    workdir = tmp_path / "run"
    _stop_at(monkeypatch, [1, 6], number)
    assert runs.train("digits.py", workdir, *overrides) == code
    assert f"{signal.Signals(number).name}: saved step 1 of 8; the same command resumes" in capsys.readouterr().err
    assert runs.train("digits.py", workdir, *overrides) == code
    assert "resuming at step 1 of 8" in capsys.readouterr().err
    assert runs.train("digits.py", workdir, *overrides) == 0
    _assert_same_end(workdir, uninterrupted, 8)


def test_training_on_images_continues_with_the_next_image(tmp_path, monkeypatch):
    """Data order, augmentation, dropout and label dropout; 1,797 images take several epochs of nothing else."""
    overrides = ("--config.network.augment_dim=9", "--config.fake_score.augment_p=0.5", "--config.network.dropout=0.1",
                 "--config.network.label_dropout=0.2", "--config.run.eval_images=0", "--config.run.features=none")
    assert runs.train("digits_teacher.py", tmp_path / "whole", *overrides) == 0
    _stop_at(monkeypatch, [3], signal.SIGTERM)
    assert runs.train("digits_teacher.py", tmp_path / "cut", *overrides) == 143
    assert runs.train("digits_teacher.py", tmp_path / "cut", *overrides) == 0
    _assert_same_end(tmp_path / "cut", tmp_path / "whole", 8)


def test_the_fake_score_s_turns_survive_a_stop(overrides, tmp_path, monkeypatch):
    """Two critic updates per generator update, cut between the two."""
    overrides = (*overrides, "--config.fake_score.updates=2", "--config.total_kimg=0.064")
    assert runs.train("digits.py", tmp_path / "whole", *overrides) == 0
    _stop_at(monkeypatch, [3], signal.SIGTERM)
    assert runs.train("digits.py", tmp_path / "cut", *overrides) == 143
    assert runs.train("digits.py", tmp_path / "cut", *overrides) == 0
    _assert_same_end(tmp_path / "cut", tmp_path / "whole", 8)


def test_a_finished_run_repeated_changes_nothing(uninterrupted, overrides, tmp_path, capsys, monkeypatch):
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    before = {p.relative_to(workdir): p.read_bytes() for p in workdir.rglob("*") if p.is_file() and p.name != "config.json"}
    monkeypatch.setattr(train._Run, "_loop", None)  # whoever calls it fails
    assert runs.train("digits.py", workdir, *overrides) == 0
    assert "nothing is left to do" in capsys.readouterr().err
    after = {p.relative_to(workdir): p.read_bytes() for p in workdir.rglob("*") if p.is_file() and p.name != "config.json"}
    assert after == before


def test_a_run_killed_while_it_wrote_the_report_writes_it_again(uninterrupted, overrides, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    (workdir / "report.json").unlink()
    assert runs.train("digits.py", workdir, *overrides) == 0
    assert json.loads((workdir / "report.json").read_text())["steps"] == 8
    _assert_same_end(workdir, uninterrupted, 8)


def test_a_signal_during_the_report_ends_the_run_at_once(uninterrupted, overrides, tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    (workdir / "report.json").unlink()
    monkeypatch.setattr(train.showcase.Showcase, "finish", lambda *args, **kwargs: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as stop:
        runs.train("digits.py", workdir, *overrides)
    assert stop.value.code == 143 and "everything is saved" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # handlers are given back


def test_length_and_run_section_may_change_and_nothing_else(uninterrupted, overrides, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    before = (workdir / "config.json").read_bytes()
    assert runs.train("digits.py", workdir, *overrides, "--config.seed=1", "--config.generator.optimizer.lr=0.5") == 2
    error = capsys.readouterr().err
    assert "belongs to another config: generator.optimizer.lr: 0.0001 -> 0.5; seed: 0 -> 1" in error
    assert runs.train("digits.py", workdir, *overrides, "--config.total_kimg=0.064") == 2
    assert "total_kimg: got 0.064, allowed: 0.128 or more" in capsys.readouterr().err
    assert (workdir / "config.json").read_bytes() == before
    assert runs.train("digits.py", workdir, *overrides, "--config.total_kimg=0.16", "--config.run.log_every=2", "--config.run.keep=1") == 0
    assert [row["step"] for row in metrics.read_metrics(workdir)] == [0, *range(1, 9), 10]
    assert json.loads((workdir / "report.json").read_text())["steps"] == 10
    assert [p.name for p in (workdir / "checkpoints").iterdir()] == ["10"]


def test_divergence_ends_with_one_line_and_leaves_the_last_checkpoint(overrides, tmp_path, capsys):
    """A learning rate under which the weights leave float32 within a few steps."""
    absurd = [f"--config.{role}.optimizer.{key}" for role in ("generator", "fake_score") for key in ("name=sgd", "lr=1000.0")]
    assert runs.train("digits.py", tmp_path / "run", *overrides, *absurd, "--config.run.save_every=2", "--config.total_kimg=0.64") == 1
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and "training has diverged; the last checkpoint is intact" in error[0]
    saved = sorted(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved, "no checkpoint before the end"
    state = runs.saved_state(tmp_path / "run", saved[-1])
    assert all(np.isfinite(array).all() for name, array in state.items() if "/params/" in name)


def test_every_term_resumes(overrides, tmp_path, monkeypatch):
    """Discriminator, objective memory, teacher's pairs and two steps: stopped once, and continued, the run ends bit for bit as it would."""
    terms = ("--config.data.name=digits", "--config.gan.weight=0.01", "--config.gan.features=teacher", "--config.regression.weight=0.1",
             "--config.regression.num_pairs=20", "--config.run.panel_images=0",
             "--config.fake_score.updates=2", "--config.fake_score.turns=other", "--config.objective.ratio_ema_rate=0.5")
    command = ("digits.py:f_distill,2", *(o for o in overrides if "max_batch" not in o), *terms)
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert runs.train(command[0], straight, *command[1:]) == 0
    with monkeypatch.context() as patch:
        _stop_at(patch, [3], signal.SIGTERM)
        assert runs.train(command[0], stopped, *command[1:]) == 143
    (stopped / "pairs.npz").unlink()                       # drawn again, the same
    assert runs.train(command[0], stopped, *command[1:]) == 0
    _assert_same_end(stopped, straight, 16)
    state = runs.saved_state(straight, 16)
    assert any(name.startswith("discriminator/params") for name in state) and any(name.startswith("objective_state") for name in state)
    report = json.loads((straight / "report.json").read_text())
    assert report["generator"]["calls"] == 2
