"""configs/scenes.py in half of its time: a teacher of scenes, then its SIM student in one call, by the commands of its docstring.

Processes of their own, on the devices that a user's would have. The bounds lie between untrained networks, which agree with no caption, and
what runs of these lengths reach.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import runs

pytestmark = pytest.mark.slow


def _run(module: str, *arguments: str) -> None:
    """One command of the README; its output is shown where it fails."""
    # glibc's huge pages: with small pages a step on a CPU takes half as long again.
    env = {**os.environ, "PYTHONPATH": str(runs.ROOT), "XLA_FLAGS": "", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run([sys.executable, "-m", f"sim_jax.{module}", *arguments], cwd=runs.ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def test_teacher_and_student_draw_what_captions_say(tmp_path):
    teacher, student, out = tmp_path / "teacher", tmp_path / "student", tmp_path / "scenes.json"
    _run("main", "--config=configs/scenes.py:teacher", f"--workdir={teacher}", "--config.total_kimg=500")
    _run("main", "--config=configs/scenes.py", f"--workdir={student}", f"--config.teacher.path={teacher}", "--config.total_kimg=60")
    _run("scene_report", f"--workdir={student}", "--num=500", f"--out={out}")
    report = json.loads(out.read_text())
    assert report["drawings"]["seen"]["all"] == 1.0
    assert report["generator"]["calls"] == 1
