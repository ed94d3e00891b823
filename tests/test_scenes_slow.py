"""configs/scenes.py as its docstring says, 25 minutes of one core: a teacher of scenes, then its SIM student in one call, and their report.

Processes of their own, on one device. Untrained networks agree with no caption; what these runs reach is in the README.
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


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    teacher, student, out = folder / "teacher", folder / "student", folder / "scenes.json"
    _run("main", "--config=configs/scenes.py:teacher", f"--workdir={teacher}")
    _run("main", "--config=configs/scenes.py", f"--workdir={student}", f"--config.teacher.path={teacher}")
    _run("scene_report", f"--workdir={student}", "--num=1000", f"--out={out}")
    return json.loads(out.read_text())


def test_the_student_draws_what_captions_say_as_the_teacher_does(report):
    """Up to five points in everything, in one call, and as varied."""
    teacher, student, drawings = (report[name] for name in ("teacher", "generator", "drawings"))
    assert drawings["seen"]["all"] == drawings["held_out_pairs"]["all"] == 1.0
    assert student["calls"] == 1 and teacher["calls"] == 70  # 35, each guided
    assert teacher["seen"]["all"] > 0.8
    for name in ("count", "colour", "shape", "relation", "all"):
        assert student["seen"][name] > teacher["seen"][name] - 0.05, name
    assert student["diversity"]["pixels"] > 0.8
    assert student["diversity"]["places"] > teacher["diversity"]["places"] - 0.05


@pytest.mark.xfail(strict=True, reason="not reached: 0.78, as the teacher has, since places are compared object by object (README)")
def test_shapes_stray_as_far_as_in_drawings(report):
    assert report["generator"]["diversity"]["places"] > 0.8
