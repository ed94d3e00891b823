"""Two processes on this machine, told to stop: launch/rehearse.sh as it stands, and its first act by itself."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

import test_distributed
from sim_jax import checkpoint, metrics

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_one_is_told_to_stop_and_both_do(tmp_path):
    """SIGTERM to the second of two processes: both save the same step and end with 143, and the first one alone says so."""
    workdir = tmp_path / "run"
    processes = test_distributed.start(
        "-m", "sim_jax.main", f"--config={ROOT / 'launch' / 'rehearsal.py'}", f"--workdir={workdir}",
        "--config.sharding.mesh=data:2,fsdp:2", "--config.sharding.rules=(('.*','fsdp:fsdp'),)", "--config.total_kimg=1000",
        "--config.run.sample_every=100000",
        "--config.run.probe_every=100000", "--config.run.grid=4", "--config.teacher.num_steps=1")
    test_distributed.wait_until(lambda: any(row["step"] >= 3 for row in metrics.read_metrics(workdir)), processes)
    processes[1].send_signal(signal.SIGTERM)
    out = test_distributed.finish(processes, 143, 143)
    step = checkpoint.latest_step(workdir / "checkpoints")
    assert step >= 3 and f"SIGTERM: saved step {step} of 62500; the same command resumes" in out[0][1]
    assert "saved step" not in out[1][1] and "steps (" not in out[1][1]
    assert max(row["step"] for row in metrics.read_metrics(workdir)) == step


@pytest.mark.slow
def test_rehearsal(tmp_path):
    """Straight; two processes stopped; one process stopped; two processes to the end."""
    env = {**os.environ, "PYTHON": sys.executable, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    begin = time.monotonic()
    command = ["bash", ROOT / "launch" / "rehearse.sh", tmp_path / "rehearsal"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("nobody stopped: done", "both stopped, step", "resumed at step", "report written once", "rehearsal passed"):
        assert words in done.stdout, done.stdout
    print(f"{done.stdout}{time.monotonic() - begin:.0f} s")
    again = subprocess.run(command, env=env, capture_output=True, text=True)
    assert again.returncode == 2 and again.stderr.startswith("error: FOLDER")
