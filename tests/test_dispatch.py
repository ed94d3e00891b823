"""Several iterations in one call are the iterations one by one: same batches, same draws, same health, whatever the cycle of turns."""

from __future__ import annotations

import signal

import jax.numpy as jnp
import numpy as np
import pytest

import runs
from sim_jax import dispatch, experiment, health, main
from test_faults import small_programs  # noqa: F401 (a fixture)
from test_resume import RANDOM, _assert_same_end, _stop_at

# Real images in every batch; the generator has every other turn, and none in the first iterations.
CYCLE = ("--config.data.name=digits", "--config.gan.weight=0.1", "--config.fake_score.updates=2", "--config.fake_score.turns=other",
         "--config.generator.start_kimg=0.048", "--config.total_kimg=0.112")


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    return (*RANDOM, f"--config.teacher.path={runs.untrained_teacher(tmp_path_factory.mktemp('untrained') / 'teacher')}",
            "--config.run.panel_images=0", "--config.run.log_every=4", "--config.run.probe_every=4", "--config.run.sample_every=4")


def _config(*overrides: str):
    return main._parse(runs.command("digits.py", "unused", *overrides))[0]


@pytest.mark.parametrize("more, step", [pytest.param((), 8, id="sim", marks=pytest.mark.slow), pytest.param(CYCLE, 17, id="cycle")])
def test_four_in_a_call_end_where_one_by_one_does(overrides, tmp_path, more, step):
    """Up to the order of float32's sums, which another program may choose."""
    folders = {}
    for size in (1, 4):
        folders[size] = tmp_path / str(size)
        assert runs.train("digits.py", folders[size], *overrides, *more, f"--config.run.steps_per_call={size}", "--config.run.keep=9") == 0
    got, expected = (runs.saved_state(folders[size], step) for size in (4, 1))
    assert got.keys() == expected.keys() and len(got) > 15
    for name, array in expected.items():
        np.testing.assert_allclose(got[name], array, rtol=2e-4, atol=2e-5 * max(np.abs(array).max(), 1e-3), err_msg=name)
    early = runs.saved_state(folders[1], 4)
    assert max(np.abs(array - early[name]).max() for name, array in expected.items()) > 1e-3, "the iterations that are compared do something"


@pytest.mark.slow
def test_a_stopped_run_goes_on_at_the_next_call(overrides, tmp_path, monkeypatch, capsys):
    calls = (*overrides, "--config.run.steps_per_call=2", "--config.run.probe_every=100", "--config.run.sample_every=100")
    assert runs.train("digits.py", tmp_path / "whole", *calls) == 0
    with monkeypatch.context() as patch:
        _stop_at(patch, [2], signal.SIGTERM)
        assert runs.train("digits.py", tmp_path / "run", *calls) == 143
    assert "saved step 2 of 8" in capsys.readouterr().err
    assert runs.train("digits.py", tmp_path / "run", *calls) == 0
    _assert_same_end(tmp_path / "run", tmp_path / "whole", 8)


def test_which_iterations_make_a_call(overrides):
    """Whole calls of the steady cycle; what comes before it, between a resumed step and the next call, and at the end, one by one."""
    built = experiment.build(_config(*overrides, *CYCLE, "--config.run.steps_per_call=4"))
    assert (built.start_steps, built.total_steps) == (3, 17)
    calls = dispatch.Calls(built)
    sizes = [len(steps) for steps in calls.plan(0)]
    assert sizes == [1, 1, 1, 1, 4, 4, 4, 1]
    assert [steps.start for steps in calls.plan(6)] == [6, 7, 8, 12, 16]
    plain = experiment.build(_config(*overrides))
    assert [len(steps) for steps in dispatch.Calls(plain).plan(5)] == [1, 1, 1]


def test_the_iteration_that_breaks_is_named():
    """The first of two in a call of eight, in cycles of two turns: its number and its figures."""
    turns = [{health.CODE: jnp.zeros(4, jnp.int32), "fake_score/loss": jnp.ones(4)} for _ in range(2)]
    turns[1] |= {health.CODE: jnp.array([0, 0, 8, 9]), "generator/loss": jnp.array([1, 1, np.nan, np.inf])}
    turns[0] |= {health.CODE: jnp.array([0, 0, 0, 2])}
    monitor = health.Monitor(16, lambda state: {}, None, lambda: None)
    monitor.add(93, [{**turn, health.CODE: jnp.zeros(4, jnp.int32)} for turn in turns])
    monitor.add(101, turns)
    with pytest.raises(health.Diverged) as stop:
        monitor.everything(108, None)
    assert stop.value.short == "generator/loss is nan at step 106"


@pytest.mark.parametrize("override, message", [
    ("--config.run.steps_per_call=0", "run.steps_per_call: got 0, allowed: above 0"),
    ("--config.run.steps_per_call=3", "run.log_every: got 4, allowed with run.steps_per_call 3: multiples of it"),
    ("--config.fake_score.updates=3", "run.steps_per_call: got 4, allowed: 1, or multiples of the 3 of fake_score.updates"),
])
def test_bad_input(overrides, tmp_path, capsys, override, message):
    assert runs.train("digits.py", tmp_path / "run", *overrides, "--config.run.steps_per_call=4", override) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()
