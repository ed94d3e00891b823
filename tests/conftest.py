"""Eight fake CPU devices, strict rank promotion, a compilation cache for the session."""

import os
import pathlib
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("NPROC", "16")  # fewer threads than fake devices can deadlock a collective
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "sim_jax_test_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_dir() -> pathlib.Path:
    """Goldens and real images beside the checkout; tests that need them skip where they are absent."""
    path = pathlib.Path(os.environ.get("SIM_JAX_SHARED", ROOT.parent / "shared"))
    if not path.is_dir():
        pytest.skip(f"no shared data at {path} (set SIM_JAX_SHARED)")
    return path


@pytest.fixture(scope="session")
def teacher_workdir(tmp_path_factory) -> pathlib.Path:
    """A finished run of configs/digits_teacher.py on a tiny network."""
    import runs

    workdir = tmp_path_factory.mktemp("teacher") / "run"
    assert runs.train("digits_teacher.py", workdir) == 0
    return workdir


@pytest.fixture(scope="session")
def teacher_dir(teacher_workdir) -> pathlib.Path:
    """Its weights, exported as a directory for `teacher.path`."""
    from sim_jax import export

    folder = teacher_workdir.parent / "weights"
    assert export.main([f"--workdir={teacher_workdir}", f"--out={folder}"]) == 0
    return folder


@pytest.fixture(scope="session")
def distilled(tmp_path_factory, teacher_dir) -> pathlib.Path:
    """The workdir of a finished run of configs/digits.py from that teacher."""
    import runs

    workdir = tmp_path_factory.mktemp("distilled") / "run"
    assert runs.train("digits.py", workdir, f"--config.teacher.path={teacher_dir}") == 0
    return workdir
