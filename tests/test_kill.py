"""Processes ended at any instant, by kill -9 or SIGTERM, end bit-identical to one that was not, having lost nothing that was saved."""

from __future__ import annotations

import os
import random
import signal

import pytest

import runs
import stoppable
from sim_jax import metrics

KILL, TERM = signal.SIGKILL, signal.SIGTERM


@pytest.fixture(autouse=True)
def one_cache_entry_for_all(monkeypatch):
    """The runs' programs are compiled once."""
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def _figures(workdir) -> dict[int, dict[str, float]]:
    """metrics.jsonl by step, but for what a clock measured; figures of an evaluation that was repeated are there twice, and the same."""
    out: dict[int, dict[str, float]] = {}
    for row in metrics.read_metrics(workdir):
        new = {name: value for name, value in row.items() if name not in runs.TIMES}
        old = out.setdefault(row["step"], {})
        assert all(old[name] == new[name] for name in old.keys() & new.keys()), (old, new)
        old |= new
    return out


def _assert_same_end(workdir, reference, steps: int) -> None:
    got, expected = runs.saved_state(workdir, steps), runs.saved_state(reference, steps)
    assert got.keys() == expected.keys() and len(got) > 15
    for name in expected:
        assert got[name].dtype == expected[name].dtype and got[name].tobytes() == expected[name].tobytes(), name
    assert _figures(workdir) == _figures(reference)
    assert stoppable.complete(workdir) == stoppable.complete(reference)
    assert (workdir / "best.safetensors").read_bytes() == (reference / "best.safetensors").read_bytes()
    assert (workdir / "checkpoints" / "figures.json").read_bytes() == (reference / "checkpoints" / "figures.json").read_bytes()


def _compare(tmp_path, *, steps: int, plan: list[tuple[int, str]], seed: int) -> dict:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    code, error = stoppable.Process(whole, steps=steps).end()
    assert code == 0, error
    tally = stoppable.kill_often(cut, steps=steps, plan=plan, seed=seed)
    _assert_same_end(cut, whole, steps)
    return tally


def test_killed_while_saving_and_stopped_while_measuring(tmp_path):
    tally = _compare(tmp_path, steps=40, plan=[(KILL, "sealing"), (TERM, "measuring")], seed=1)
    assert sum(tally.values()) == 2


@pytest.mark.slow
def test_sixty_kills(tmp_path):
    """SIM_JAX_KILL_SEED draws others."""
    seed = int(os.environ.get("SIM_JAX_KILL_SEED", "0"))
    draw = random.Random(seed)
    plan = draw.sample([(number, moment) for number in (KILL, KILL, TERM) for moment in stoppable.MOMENTS for _ in range(3)], 60)
    tally = _compare(tmp_path, steps=800, plan=plan, seed=seed)
    print(tally)
    assert sum(tally.values()) == 60, "the run ended before the last kill: more steps are needed"
