"""A state saved on some devices in some layout goes on on others in another: equal bit for bit, with the same next losses."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import tiny
from sim_jax import checkpoint, sharding

NET = tiny.PixelNet()
LAYOUTS = {
    "copies": dict(mesh="data:-1", rules=((".*", "replicate"),)),
    "fsdp": dict(mesh="data:-1", rules=((".*", "fsdp"),)),
    "data x fsdp": dict(mesh="data:2,fsdp:-1", rules=((".*", "fsdp:fsdp"),)),
}
PLACED: dict = {}


def placed(name: str, devices: int):
    """(shardings, teacher, jitted step, state to start from) of a layout, compiled once."""
    name = name if devices > 1 else "copies"
    if (name, devices) not in PLACED:
        _, state, teacher, step = tiny.placed(NET, devices=devices, **LAYOUTS[name])
        PLACED[name, devices] = jax.tree.map(lambda a: a.sharding, state), teacher, step, state
    return PLACED[name, devices]


def shapes_of(state):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(np.shape(a), np.asarray(a).dtype), state)


def advance(state, name: str, devices: int):
    """One iteration there: (state, losses)."""
    _, teacher, step, _ = placed(name, devices)
    state, metrics = jax.block_until_ready(step(state, teacher, jax.random.key(7), None))
    return state, np.array([float(metrics[f"{role}/loss"]) for role in ("fake_score", "generator")])


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A state with history, by iterations on 8 devices: saved in every layout from the same numbers; and the next iteration's losses."""
    state = placed("copies", 8)[3]
    for _ in range(2):
        state, _ = advance(state, "copies", 8)
    host = sharding.to_host(state)
    folders = {}
    for name in LAYOUTS:
        folders[name] = tmp_path_factory.mktemp("elastic") / "checkpoints"
        with checkpoint.Checkpoints(folders[name]) as checkpoints:
            checkpoints.save(2, sharding.place(host, placed(name, 8)[0]), {})
    _, losses = advance(state, "copies", 8)
    return host, folders, losses


def restored(folder, host, name: str, devices: int):
    with checkpoint.Checkpoints(folder) as checkpoints:
        return checkpoints.restore_newest(shapes_of(host), placed(name, devices)[0])[1]


@pytest.mark.parametrize("to, devices", [("data x fsdp", 4), ("copies", 1),
                                         *(pytest.param(*case, marks=pytest.mark.slow) for case in (
                                             ("copies", 8), ("copies", 4), ("fsdp", 8), ("fsdp", 4), ("fsdp", 1), ("data x fsdp", 8)))])
def test_from_each_layout_to_each_other(start, to, devices):
    host, folders, losses = start
    for origin in LAYOUTS:
        state = restored(folders[origin], host, to, devices)
        assert all(len(a.sharding.device_set) == devices for a in jax.tree.leaves(state))
        jax.tree.map(np.testing.assert_array_equal, sharding.to_host(state), host)
    if devices == 1 or to == "copies":
        assert all(a.sharding.is_fully_replicated for a in jax.tree.leaves(state))
    else:
        assert not state.generator.params["enc"]["weight"].sharding.is_fully_replicated
        assert not state.generator.ema["ema_0.02k"]["enc"]["weight"].sharding.is_fully_replicated
    _, got = advance(state, to, devices)
    np.testing.assert_allclose(got, losses, rtol=1e-5)


@pytest.mark.parametrize("names", [("fsdp", "data x fsdp", "copies", "copies"),
                                   pytest.param(("copies", "fsdp", "copies", "data x fsdp"), marks=pytest.mark.slow)])
def test_eight_four_one_eight(tmp_path, names):
    """Two iterations in each place, saved and taken to the next, against a run that stays on eight devices."""
    reference = sharding.place(tiny.host_state(tiny.recipe(NET)), placed("copies", 8)[0])
    host = tiny.host_state(tiny.recipe(NET))
    expected = []
    for _ in range(8):
        reference, losses = advance(reference, "copies", 8)
        expected.append(losses)
    state, step, got = sharding.place(host, placed(names[0], 8)[0]), 0, []
    for name, devices, after in zip(names, (8, 4, 1, 8), (4, 1, 8, None)):
        for _ in range(2):
            state, losses = advance(state, name, devices)
            got.append(losses)
        step += 2
        if after is None:
            break
        with checkpoint.Checkpoints(tmp_path / "checkpoints") as checkpoints:
            checkpoints.save(step, state, {})
            before = sharding.to_host(state)
        target = names[(4, 1, 8).index(after) + 1]
        state = restored(tmp_path / "checkpoints", host, target, after)
        assert int(state.step) == step
        jax.tree.map(np.testing.assert_array_equal, sharding.to_host(state), before)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
