"""What goes wrong during a run, and how it ends: damaged checkpoints, a full disk, a second run in the same folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import resource
import shutil
import subprocess
import time

import jax
import numpy as np
import pytest

import runs
from sim_jax import metrics, storage, train, workdirs
from test_checkpoint import flip, largest
from test_resume import RANDOM, _assert_same_end


@pytest.fixture(scope="module", autouse=True)
def small_programs():
    with pytest.MonkeyPatch.context() as patch:
        runs.use_pixel_networks(patch)
        before = jax.config.jax_persistent_cache_min_compile_time_secs
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        yield
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    teacher = runs.untrained_teacher(tmp_path_factory.mktemp("untrained") / "teacher")
    return (*RANDOM, f"--config.teacher.path={teacher}", "--config.run.panel_images=0", "--config.run.probe_every=100")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, overrides):
    """Eight iterations, checkpoints 4 and 8."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert runs.train("digits.py", workdir, *overrides) == 0
    return workdir


@pytest.fixture
def copy(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "report.json").unlink()
    return tmp_path / "run"


def test_a_damaged_newest_checkpoint_costs_the_steps_since_the_one_before(copy, whole, overrides, capsys):
    flip(largest(copy / "checkpoints" / "8"))
    assert runs.train("digits.py", copy, *overrides) == 0
    error = capsys.readouterr().err
    assert "checkpoint 8 is damaged (the content of state/" in error and "): put aside as 8.damaged" in error
    assert "run: step 4 is the newest good checkpoint\nrun: resuming at step 4 of 8\n" in error
    _assert_same_end(copy, whole, 8)
    assert sorted(p.name for p in (copy / "checkpoints").iterdir()) == ["4", "8", "8.damaged"]


def test_no_good_checkpoint_is_one_line_and_changes_nothing(copy, overrides, capsys):
    flip(largest(copy / "checkpoints" / "8"))
    largest(copy / "checkpoints" / "4").unlink()
    before = {p.relative_to(copy): p.read_bytes() for p in copy.rglob("*") if p.is_file() and p.name not in ("config.json", ".lock")}
    assert runs.train("digits.py", copy, *overrides) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "no checkpoint there is good (step 8: the content of state/" in lines[0] and "nothing was changed" in lines[0]
    assert {p.relative_to(copy): p.read_bytes() for p in copy.rglob("*") if p.is_file() and p.name not in ("config.json", ".lock")} == before


@contextlib.contextmanager
def _small_disk(folder):
    """A file system of 8 MB; skips where none can be mounted."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _fill(folder) -> None:
    with contextlib.suppress(OSError), open(folder / "ballast", "wb", buffering=0) as file:
        while file.write(b"\0" * 4096):
            pass


def _ends_for_the_disk_s_sake(capsys, reason: str) -> None:
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("run: ")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ") and lines[0].endswith(
        f"/run: {reason}; the checkpoint of step 4 is complete; make room, and the same command resumes")


def _at(step: int, method, harm):
    """`method` of (self, step, ...), after `harm()` where `step` comes for the first time."""
    left = [step]

    def wrapped(self, at, *args, **kwargs):
        if left == [at]:
            left.clear()
            harm()
        return method(self, at, *args, **kwargs)

    return wrapped


@pytest.mark.parametrize("where", ["while it logs", pytest.param("while it saves", marks=pytest.mark.slow),
                                   pytest.param("while it draws samples", marks=pytest.mark.slow)])
def test_a_full_disk(overrides, whole, tmp_path, capsys, monkeypatch, where):
    owner, name, step = {"while it logs": (train.ProgressBar, "update", 5), "while it saves": (train.checkpoint.Checkpoints, "save", 8),
                         "while it draws samples": (train.showcase.Showcase, "samples", 5)}[where]
    with _small_disk(tmp_path / "disk"):
        workdir = tmp_path / "disk" / "run"

        def harm():
            while not (workdir / "checkpoints" / "4").exists():  # saved in the background
                time.sleep(0.01)
            _fill(tmp_path / "disk")

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, _at(step, getattr(owner, name), harm))
            assert runs.train("digits.py", workdir, *overrides) == 1
        _ends_for_the_disk_s_sake(capsys, "no space left on the device")
        assert runs.saved_state(workdir, 4).keys() == runs.saved_state(whole, 4).keys()
        (tmp_path / "disk" / "ballast").unlink()
        assert runs.train("digits.py", workdir, *overrides) == 0
        _assert_same_end(workdir, whole, 8)


def test_a_file_size_limit(overrides, whole, tmp_path, capsys, monkeypatch):
    """The same without root: from step 8 on no file may grow beyond a kilobyte."""
    workdir, (soft, hard) = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    limited = _at(8, train.checkpoint.Checkpoints.save, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard)))
    with monkeypatch.context() as patch:
        patch.setattr(train.checkpoint.Checkpoints, "save", limited)
        try:
            assert runs.train("digits.py", workdir, *overrides) == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    _ends_for_the_disk_s_sake(capsys, "file size limit exceeded")
    assert runs.train("digits.py", workdir, *overrides) == 0
    _assert_same_end(workdir, whole, 8)


def test_tensorboard_s_writer_may_die(tmp_path, caplog):
    """It is a thread with a queue of ten, which a full disk ends: nothing waits for it, and metrics.jsonl goes on."""
    with metrics.MetricWriter(tmp_path) as writer:
        def full(event):
            raise OSError(errno.ENOSPC, "No space left on device")

        events = writer._board.file_writer.event_writer
        events._ev_writer.write_event = full
        with storage.explained(tmp_path, lambda: None):   # which keeps the thread's traceback to itself
            writer.write(1, 0.1, {"loss": 1.0})
            writer.flush()
            events._worker.join(timeout=10)
        for step in range(2, 40):
            writer.write(step, 0.1 * step, {"loss": 1.0})
            writer.write_image(step, "picture", np.zeros((64, 64, 3), np.uint8))
    assert len(metrics.read_metrics(tmp_path)) == 39
    assert [record.getMessage() for record in caplog.records] == ["TensorBoard's events end here: their writer has stopped"]


def test_reasons():
    assert storage.reason(OSError(28, "x")) == "no space left on the device"
    assert storage.reason(ValueError("Error writing local file: [OS error 28: ENOSPC No space left on device]")) == "no space left on the device"
    assert storage.reason(RuntimeError("anything else")) is None
    try:
        try:
            raise OSError(122, "Disk quota exceeded")
        except OSError as error:
            raise KeyError("closing") from error
    except KeyError as error:
        assert storage.reason(error) == "disk quota exceeded"


def test_two_runs_in_one_workdir(copy, overrides, capsys):
    with open(copy / workdirs.LOCK, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("process 7 on elsewhere")
        file.flush()
        assert runs.train("digits.py", copy, *overrides) == 2
        assert "is in use by process 7 on elsewhere; wait for it to end, or choose another --workdir" in capsys.readouterr().err
    with workdirs.locked(copy, wanted=True):
        assert (copy / workdirs.LOCK).read_text().startswith(f"process {os.getpid()} on ")
    with workdirs.locked(copy, wanted=True):    # given back
        pass


def test_another_config_is_accepted_where_the_state_fits(copy, overrides, capsys):
    changed = (*overrides, "--config.generator.optimizer.lr=0.0002", "--config.total_kimg=0.16")
    assert runs.train("digits.py", copy, *changed) == 2
    assert "belongs to another config: generator.optimizer.lr: 0.0001 -> 0.0002; choose another --workdir, or let the run go on with the " \
           "new values by --accept_changes" in capsys.readouterr().err
    before = (copy / "config.json").read_bytes()
    assert runs.train("digits.py", copy, *changed, "--config.ema.halflife_kimg=(3.0,)", "--accept_changes") == 2
    assert "--accept_changes: the state of step 8 does not fit ema.halflife_kimg: [2.0] -> [3.0]; generator.optimizer.lr: 0.0001 -> 0.0002: " \
           "generator/ema/ema_2k/dec/weight: float32" in capsys.readouterr().err
    assert (copy / "config.json").read_bytes() == before
    assert runs.train("digits.py", copy, *changed, "--accept_changes") == 0
    record = json.loads((copy / "config.json").read_text())
    assert record["config"]["generator"]["optimizer"]["lr"] == 0.0002
    assert [(c["step"], c["changes"]) for c in record["accepted_changes"]] == [(8, ["generator.optimizer.lr: 0.0001 -> 0.0002"])]
    assert runs.train("digits.py", copy, *changed) == 0    # it is the run's config now
    assert json.loads((copy / "config.json").read_text())["accepted_changes"] == record["accepted_changes"]


@pytest.mark.slow
def test_layout_and_accumulation_may_change(copy, overrides, capsys):
    moved = [o for o in overrides if "max_batch" not in o]
    assert runs.train("digits.py", copy, *moved, "--config.total_kimg=0.144", "--config.sharding.rules=(('.*','fsdp'),)",
                      "--config.sharding.mesh=data:4,fsdp:2") == 0
    assert "resuming at step 8 of 9" in capsys.readouterr().err
