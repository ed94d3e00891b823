"""A run that starts where another one ended."""

from __future__ import annotations

import json
import re

import jax
import numpy as np
import pytest

import runs
from sim_jax import experiment as experiments
from sim_jax import init_from, main
from test_faults import overrides, small_programs, whole  # noqa: F401 (fixtures)

OTHER = "--config.seed=5"


def _initial(*arguments):
    """The state that a run with these arguments starts from, as {path: array}."""
    config, values, _ = main._parse(runs.command("digits.py", "unused", *arguments))
    experiment = experiments.build(config)
    init = init_from.parse(values.init_from, values.init_ema, values.init_networks)
    state = experiments.initial_state(experiment)
    state = state if init is None else init_from.replace(state, init_from.find(init, experiment), experiment)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


@pytest.mark.parametrize("flags, average, fake", [
    ((), "ema/ema_2k", False), (("--init_ema=raw",), "params", False), (("--init_networks=generator,fake_score",), "ema/ema_2k", True)])
def test_the_networks_are_the_other_run_s_and_all_else_is_new(whole, overrides, flags, average, fake):  # noqa: F811
    source, plain = runs.saved_state(whole, 8), _initial(*overrides, OTHER)
    got = _initial(*overrides, OTHER, f"--init_from={whole}", *flags)
    changed = set()
    for name, value in got.items():
        for kind in ("generator/params/", "generator/ema/ema_2k/"):
            if name.startswith(kind):
                np.testing.assert_array_equal(value, source[f"generator/{average}/{name.removeprefix(kind)}"])
                changed.add(name)
        if fake and name.startswith("fake_score/params/"):
            np.testing.assert_array_equal(value, source[name])
            changed.add(name)
    assert len(changed) >= 6
    for name in got.keys() - changed:
        np.testing.assert_array_equal(got[name], plain[name])
    assert any((got[name] != plain[name]).any() for name in changed if name.startswith("generator/params"))


def test_it_is_recorded_and_belongs_to_the_run(whole, overrides, tmp_path, capsys):  # noqa: F811
    begin = (*overrides, OTHER, "--config.total_kimg=0.032")
    assert runs.train("digits.py", tmp_path / "run", *begin, f"--init_from={whole}") == 0
    assert f"starting from {whole} (step 8, ema ema_2k)" in capsys.readouterr().err
    recorded = {"path": str(whole), "ema": None, "networks": ["generator"], "origin": {"path": str(whole), "step": 8, "ema": "ema_2k"}}
    assert json.loads((tmp_path / "run" / "config.json").read_text())["init_from"] == recorded
    longer = (*overrides, OTHER, "--config.total_kimg=0.048")
    assert runs.train("digits.py", tmp_path / "run", *longer, f"--init_from={whole}", "--init_ema=raw") == 2
    assert f"--init_from: got {whole} (raw; generator) for {tmp_path / 'run'}, whose run started from {whole} (first average; generator)" \
        in capsys.readouterr().err
    assert runs.train("digits.py", tmp_path / "run", *longer, f"--init_from={whole}") == 0
    error = capsys.readouterr().err
    assert "--init_from is ignored: the run goes on from its own checkpoint" in error and "resuming at step 2 of 3" in error
    assert runs.train("digits.py", tmp_path / "run", *longer) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["init_from"] == recorded


@pytest.mark.parametrize("flags, message", [
    (("--init_from={whole}", "--config.network.model_channels=16", "--config.teacher.path=random:0"),
     "holds another network than this run trains: model_channels: 8 != 16"),
    (("--init_from={tmp}/nothing",), "--init_from: .*nothing.*not found"),
    (("--init_from={whole}", "--init_ema=ema_7k"), "--init_from: ema: got 'ema_7k', allowed: ema_2k, raw"),
    (("--init_from={whole}", "--init_networks=fake_score"), "--init_networks: got 'fake_score', allowed: generator, or generator,fake_score"),
    (("--init_from={teacher}", "--init_networks=generator,fake_score"), "--init_networks: got fake_score with .*, allowed with the workdir"),
    (("--init_ema=raw",), "--init_ema: got 'raw', allowed only with --init_from"),
])
def test_what_cannot_be_started_from(whole, overrides, tmp_path, capsys, flags, message):  # noqa: F811
    teacher = next(o.split("=")[1] for o in overrides if "teacher.path" in o)
    flags = [flag.format(whole=whole, tmp=tmp_path, teacher=teacher) for flag in flags]
    given = {flag.split("=")[0] for flag in flags}
    assert runs.train("digits.py", tmp_path / "run", *(o for o in overrides if o.split("=")[0] not in given), *flags) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1 and not (tmp_path / "run").exists()
