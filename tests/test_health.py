"""NaN and Inf are found before they are saved, and named: network, iteration, noise level; a run may roll back and slow down."""

from __future__ import annotations

import functools
import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import runs
import tiny
from sim_jax import dispatch, health, metrics, train
from test_faults import overrides, small_programs  # noqa: F401 (fixtures)
from test_resume import _assert_same_end, _stop_at

NET = tiny.PixelNet()


def _nan(tree):
    return jax.tree.map(lambda a: jnp.full_like(a, jnp.nan) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)


def _inject(monkeypatch, network: str, at: int):
    """Makes the parameters of a network NaN before iteration `at`; once."""
    make, left = dispatch.make_step, [at]

    def made(experiment):
        step_fn = make(experiment)

        def step(state, teacher_params, *args, **turns):
            if left and int(state.step) + 1 == left[0]:
                left.pop()
                if network == "teacher":
                    teacher_params = _nan(teacher_params)
                else:
                    one = getattr(state, network)
                    state = state.replace(**{network: one.replace(params=_nan(one.params))})
            return step_fn(state, teacher_params, *args, **turns)

        step.jitted = step_fn
        made.jitted = step_fn
        return step

    monkeypatch.setattr(dispatch, "make_step", made)
    return made


GAN = ("--config.data.name=digits", "--config.gan.weight=0.1")


@pytest.mark.parametrize("network, message", [
    ("generator", "at step 6 the parameters of the generator are NaN or infinite"),
    ("fake_score", "at step 6 the parameters of the fake score are NaN or infinite"),
    pytest.param("discriminator", "at step 6 the parameters of the discriminator are NaN or infinite", marks=pytest.mark.slow),
    ("teacher", "generator/loss is nan at step 6 (in 16 of 16 samples)"),  # put right again before anyone looks
])
def test_a_nan_in_each_network_is_named_and_never_saved(overrides, tmp_path, capsys, monkeypatch, network, message):  # noqa: F811
    """Once it is everywhere, the first iteration that had it tells whose it was."""
    with monkeypatch.context() as patch:
        _inject(patch, network, 6)
        more = GAN if network == "discriminator" else ()
        assert runs.train("digits.py", tmp_path / "run", *overrides, *more, "--config.run.log_every=4") == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and lines[0].startswith(f"error: {message}"), lines
    assert "training has diverged; the last checkpoint is intact (step 4); lower the learning rates" in lines[0]
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["4"]
    state = runs.saved_state(tmp_path / "run", 4)
    assert all(np.isfinite(array).all() for array in state.values() if array.dtype.kind == "f")


def test_a_teacher_that_is_not_finite_is_bad_input(overrides, tmp_path, capsys, monkeypatch):  # noqa: F811
    build = train.experiments.build

    def broken(config):
        experiment = build(config)
        params = jax.tree.map(np.array, experiment.teacher.params)
        jax.tree.leaves(params)[0].flat[3] = np.inf
        object.__setattr__(experiment.teacher, "params", params)
        return experiment

    monkeypatch.setattr(train.experiments, "build", broken)
    assert runs.train("digits.py", tmp_path / "run", *overrides) == 2
    assert "teacher.path: got NaN or infinity in " in capsys.readouterr().err and not (tmp_path / "run").exists()


def _watched(pair_loss=None):
    """A recipe, its state, teacher's parameters and the step, with a loss of our own for the generator."""
    import dataclasses

    made, state, teacher, _ = tiny.placed(NET, devices=1)
    if pair_loss is not None:
        made = dataclasses.replace(made, objective=dataclasses.replace(made.objective, pair_loss=pair_loss(made.objective.pair_loss)))
    return made, state, teacher, jax.jit(functools.partial(health.watched_step, made), static_argnames=("update_critic", "update_generator"))


def _monitor(teacher, saved=None):
    return health.Monitor(8, jax.jit(health.parts), teacher, lambda: saved)


def test_the_watched_step_is_the_step(monkeypatch):
    """Bit for bit, and nothing of it is logged."""
    made, state, teacher, step = _watched()
    plain = jax.jit(functools.partial(train.health.steps.train_step, made))
    expected, figures = plain(state, teacher, jax.random.key(7))
    got, seen = step(state, teacher, jax.random.key(7))
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    logged = health.logged(seen)
    assert logged.keys() == figures.keys() and int(seen[health.CODE]) == 0
    for name in figures:
        assert float(logged[name]) == pytest.approx(float(figures[name]), rel=1e-6)


def test_half_a_learning_rate_is_half_an_update():
    _, state, teacher, step = _watched()
    key = jax.random.key(7)
    whole, half = (step(state, teacher, key, None, jnp.float32(scale))[0] for scale in (1.0, 0.5))
    same = step(state, teacher, key)[0]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), whole.generator.params, same.generator.params)
    for role in ("fake_score",):  # the generator sees another fake score
        moved = jax.tree.map(lambda a, b: a - b, getattr(whole, role).params, getattr(state, role).params)
        less = jax.tree.map(lambda a, b: 2 * (a - b), getattr(half, role).params, getattr(state, role).params)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6), less, moved)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), half.fake_score.opt_state, whole.fake_score.opt_state)


def test_the_noise_levels_of_samples_that_are_not_finite():
    """A loss that overflows above some level names how many, and where; gradients are infinite with it, and come after it."""
    levels = []

    def overflowing(loss):
        def pair_loss(nets, x0, noise, level, cond):
            value, figures = loss(nets, x0, noise, level, cond)
            threshold = jnp.sort(level.sigma)[-3]
            jax.debug.callback(lambda sigma: levels.append(np.asarray(sigma)), level.sigma)
            return jnp.where(level.sigma >= threshold, jnp.inf, value), figures

        return pair_loss

    _, state, teacher, step = _watched(overflowing)
    monitor = _monitor(teacher, saved=30)
    for done in (31, 32):
        state, seen = jax.block_until_ready(step(state, teacher, jax.random.key(7)))
        monitor.add(done, [health.watched(seen)])
    jax.effects_barrier()
    top = np.sort(levels[0])[-3:]
    monitor.line()                                       # one line late
    with pytest.raises(health.Diverged) as stop:
        monitor.line()
    assert stop.value.short == f"generator/loss is inf at step 31 (in 3 of 8 samples, at noise levels of sigma {np.mean(top):.3g} on average)"
    assert "the last checkpoint is intact (step 30)" in str(stop.value)


def test_what_the_last_step_made_is_checked_before_it_is_saved():
    _, state, teacher, step = _watched()
    state, seen = step(state, teacher, jax.random.key(7))
    monitor = _monitor(teacher)
    monitor.add(1, [health.watched(seen)])
    monitor.everything(1, state)
    generator = state.generator
    for broken, what in ((generator.replace(ema=_nan(generator.ema)), "the averages of the generator"),
                         (generator.replace(params=_nan(generator.params)), "the parameters of the generator"),
                         (generator.replace(opt_state=_nan(generator.opt_state)), "the optimiser state of the generator")):
        with pytest.raises(health.Diverged, match=f"after step 1 {what} are NaN or infinite: training has diverged; no checkpoint was written"):
            monitor.everything(1, state.replace(generator=broken))


def test_a_rollback_slows_down_goes_on_and_is_remembered(overrides, tmp_path, capsys, monkeypatch):  # noqa: F811
    """Once, with one compiled program; stopped afterwards and resumed, the end is the same bit for bit."""
    rolling = (*overrides, "--config.run.on_divergence=rollback", "--config.run.rollback_lr=0.25")
    with monkeypatch.context() as patch:
        made = _inject(patch, "fake_score", 6)
        assert runs.train("digits.py", tmp_path / "whole", *rolling) == 0
        assert made.jitted._cache_size() == 1
    error = capsys.readouterr().err
    assert "run: at step 6 the parameters of the fake score are NaN or infinite: back to step 4, with 0.25 times the learning rates " \
           "(rollback 1 of 3)".replace("run:", "whole:") in error, error
    rows = metrics.read_metrics(tmp_path / "whole")
    assert [row["step"] for row in rows if "fake_score/loss" in row] == list(range(1, 9))
    assert [row.get("lr_scale") for row in rows if "fake_score/loss" in row] == [None] * 4 + [0.25] * 4
    meta = json.loads((tmp_path / "whole" / "checkpoints" / "8" / "meta" / "metadata").read_text())
    assert (meta["rollbacks"], meta["lr_scale"]) == (1, 0.25)
    with monkeypatch.context() as patch:
        _inject(patch, "fake_score", 6)
        _stop_at(patch, [7], signal.SIGTERM)
        assert runs.train("digits.py", tmp_path / "cut", *rolling) == 143
    assert runs.train("digits.py", tmp_path / "cut", *rolling) == 0
    _assert_same_end(tmp_path / "cut", tmp_path / "whole", 8)


@pytest.mark.slow
def test_rollbacks_are_counted(overrides, tmp_path, capsys):  # noqa: F811
    """From the start where there is no checkpoint, until they are used up."""
    absurd = [f"--config.{role}.optimizer.{key}" for role in ("generator", "fake_score") for key in ("name=sgd", "lr=1000.0")]
    assert runs.train("digits.py", tmp_path / "run", *overrides, *absurd, "--config.run.on_divergence=rollback",
                      "--config.run.max_rollbacks=2", "--config.run.rollback_lr=0.9", "--config.run.save_every=1000",
                      "--config.total_kimg=0.64") == 1
    error = capsys.readouterr().err
    assert "back to step 0, with 0.9 times the learning rates (rollback 1 of 2)" in error and "with 0.81 times" in error
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and lines[0].endswith("; the 2 rollbacks of run.max_rollbacks are used up")
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
