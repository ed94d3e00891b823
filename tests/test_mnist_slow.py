"""configs/mnist.py in minutes instead of most of an hour: a teacher, then its SIM student in one call, by the commands of its docstring.

Processes of their own, on the devices that a user's would have. The bounds lie between what the untrained student of a trained teacher
draws, D(2.5 z; 2.5), which is blurred means of the right classes, and what runs of these lengths reach.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

import runs
from sim_jax.data import images as image_data
from sim_jax.data.source import gather
from sim_jax.evals import features

pytestmark = pytest.mark.slow
COUNT = 500


def _run(module: str, *arguments: str) -> None:
    """One command of the README; its output is shown where it fails."""
    # glibc's huge pages: with small pages a step on a CPU takes half as long again.
    env = {**os.environ, "PYTHONPATH": str(runs.ROOT), "XLA_FLAGS": "", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    done = subprocess.run([sys.executable, "-m", f"sim_jax.{module}", *arguments], cwd=runs.ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def _sample(folder, workdir, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """500 images and the classes that they were asked for, from the average of the weights."""
    file = folder / f"{workdir.name}.npz"
    _run("sample", f"--workdir={workdir}", f"--num={COUNT}", f"--steps={steps}", "--seed=1", "--batch=100", f"--out={file}")
    with np.load(file) as arrays:
        return arrays["images"], arrays["labels"]


@pytest.fixture(scope="module")
def archive(shared_dir):
    path = shared_dir / "data" / "mnist-28x28.zip"
    if not path.is_file():
        pytest.skip(f"no {path}")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("mnist")


@pytest.fixture(scope="module")
def teacher(archive, folder):
    workdir = folder / "teacher"
    _run("main", "--config=configs/mnist.py:teacher", f"--workdir={workdir}", f"--config.data.path={archive}", "--config.total_kimg=19.2",
         "--config.run.sample_every=1000")
    return workdir


@pytest.fixture(scope="module")
def student(teacher, folder):
    workdir = folder / "student"
    _run("main", "--config=configs/mnist.py", f"--workdir={workdir}", f"--config.teacher.path={teacher}", "--config.total_kimg=9.6",
         "--config.run.sample_every=1000", "--config.run.probe_every=1000")
    return workdir


def _agreement(pixels: np.ndarray, classes: np.ndarray) -> float:
    _, probabilities = features.mnist_features()(pixels)
    return float((probabilities.argmax(1) == classes).mean())


def _spread(pixels: np.ndarray, classes: np.ndarray) -> float:
    """Standard deviation of a pixel among images of one class, averaged over pixels and classes."""
    return float(np.mean([pixels[classes == k].std(0).mean() for k in range(10)]))


def test_teacher_and_student_draw_the_digits_they_are_asked_for(archive, folder, teacher, student):
    real, labels = gather(image_data.open_images(archive, channels=1), np.arange(1000))
    for workdir, steps in ((teacher, 35), (student, 1)):
        pixels, classes = _sample(folder, workdir, steps)
        assert pixels.shape == (COUNT, 28, 28, 1) and set(classes) == set(range(10))
        # Ink, contrast, and variety within a class, in grey levels: 35, 81 and 39 for real digits, 41, 58 and 16 for blurred means.
        assert abs(pixels.mean() - real.mean()) < 6, workdir
        assert abs(pixels.std() - real.std()) < 15, workdir
        assert _spread(pixels, classes) > 0.65 * _spread(real, labels), workdir
        assert _agreement(pixels, classes) > 0.5, workdir
