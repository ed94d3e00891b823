"""Optimisers against optax and formulas, schedules at their corners, and the average's half-life."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tiny
from sim_jax import optim


def tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {"conv": {"weight": np.float32(scale * rng.standard_normal((3, 3, 4, 4))), "bias": np.float32(scale * rng.standard_normal(4))},
            "gain": np.float32(scale * rng.standard_normal((4, 4)))}


def descend(optimizer, steps=5):
    params = tree(0)
    state = optimizer.init(params)
    for i in range(steps):
        updates, state = optimizer.update(tree(i + 1, scale=10.0 ** (i - 3)), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("eps", [1e-8, 1e-2])
def test_adam_without_first_moment_is_adam(eps):
    """b1 = 0: the same numbers as optax's Adam over gradients of several magnitudes, from one moment instead of two."""
    ours, state = descend(optim.make_optimizer(name="adam", lr=1e-2, b1=0.0, b2=0.99, eps=eps))
    theirs, other = descend(optax.adam(1e-2, b1=0.0, b2=0.99, eps=eps))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    size = lambda s: sum(np.size(leaf) for leaf in jax.tree.leaves(s))  # noqa: E731
    assert size(state) < 0.55 * size(other)


def test_adam_in_numpy():
    """Kingma and Ba's algorithm 1, bias corrections and all, with b1 > 0."""
    lr, b1, b2, eps = 1e-2, 0.9, 0.99, 1e-8
    ours, _ = descend(optim.make_optimizer(lr=lr, b1=b1, b2=b2, eps=eps))
    theta, m, v = np.float64(tree(0)["gain"]), 0.0, 0.0
    for t in range(1, 6):
        g = np.float64(tree(t, scale=10.0 ** (t - 4))["gain"])
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        theta = theta - lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    np.testing.assert_allclose(ours["gain"], theta, rtol=1e-5, atol=1e-6)


def test_decay_is_decoupled_and_skips_vectors():
    """adamw: an extra - lr wd theta on matrices and kernels; biases move as under adam."""
    grads, params = tree(1), tree(0)
    decayed, plain = optim.make_optimizer(name="adamw", lr=1e-2, weight_decay=0.1), optim.make_optimizer(name="adam", lr=1e-2)
    (a, _), (b, _) = decayed.update(grads, decayed.init(params), params), plain.update(grads, plain.init(params), params)
    np.testing.assert_allclose(a["conv"]["weight"] - b["conv"]["weight"], -1e-3 * params["conv"]["weight"], atol=1e-8)
    np.testing.assert_array_equal(a["conv"]["bias"], b["conv"]["bias"])


def test_clipping():
    """A gradient of norm 10 is shortened to norm 1; one of norm 0.5 passes."""
    sgd = optim.make_optimizer(name="sgd", lr=1.0, clip_norm=1.0)
    for norm, expected in ((10.0, 1.0), (0.5, 0.5)):
        grads = {"a": np.float32([0.6 * norm]), "b": np.float32([0.8 * norm])}
        updates, _ = sgd.update(grads, sgd.init(grads), grads)
        np.testing.assert_allclose([updates["a"][0], updates["b"][0]], [-0.6 * expected, -0.8 * expected], rtol=1e-6)


def test_schedules():
    """Corners and middles; the warm-up counts towards the total."""
    make = lambda **changes: optim.make_schedule(**{**dict(  # noqa: E731
        lr=1.0, warmup_steps=0, schedule="constant", total_steps=100, final_fraction=0.1), **changes})
    assert [float(make()(i)) for i in (0, 50, 1000)] == [1, 1, 1]
    linear = make(schedule="linear")
    np.testing.assert_allclose([linear(i) for i in (0, 50, 100, 200)], [1, 0.55, 0.1, 0.1], rtol=1e-6)
    cosine = make(schedule="cosine")
    np.testing.assert_allclose([cosine(i) for i in (0, 25, 50, 100)], [1, 0.1 + 0.9 * (1 + np.sqrt(0.5)) / 2, 0.55, 0.1], rtol=1e-5)
    warm = make(schedule="linear", warmup_steps=20)
    np.testing.assert_allclose([warm(i) for i in (0, 10, 20, 60, 100)], [0, 0.5, 1, 0.55, 0.1], rtol=1e-6)


def test_schedule_drives_the_optimizer():
    sgd = optim.make_optimizer(name="sgd", lr=1.0, schedule="linear", final_fraction=0.0, total_steps=4)
    params, state = {"a": np.float32([0.0])}, sgd.init({"a": np.float32([0.0])})
    moves = []
    for _ in range(5):
        updates, state = sgd.update({"a": np.float32([1.0])}, state, params)
        moves.append(float(updates["a"][0]))
    np.testing.assert_allclose(moves, [-1, -0.75, -0.5, -0.25, 0], atol=1e-6)


@pytest.mark.parametrize("knobs, words", [
    (dict(name="adan"), ("optimizer.name", "adan", "adamw")),
    (dict(schedule="step"), ("optimizer.schedule", "step", "cosine")),
    (dict(lr=-1e-4), ("optimizer.lr", "-0.0001")),
    (dict(lr=float("nan")), ("optimizer.lr", "nan")),
    (dict(b1=1.0), ("optimizer.b1", "1.0", "exclusive")),
    (dict(b2=1.5), ("optimizer.b2", "1.5")),
    (dict(clip_norm=-1.0), ("optimizer.clip_norm", "-1.0")),
    (dict(warmup_steps=-3), ("optimizer.warmup_steps", "-3")),
    (dict(weight_decay=0.1), ("optimizer.weight_decay", "0.1", "adamw")),
    (dict(final_fraction=-0.5), ("optimizer.final_fraction", "-0.5")),
])
def test_bad_knobs_are_named(knobs, words):
    with pytest.raises(ValueError) as error:
        optim.make_optimizer(**knobs)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def average(emas, params, seen, batch, **knobs):
    return optim.update_ema(emas, params, jnp.float32(seen), batch, **{**dict(halflife_kimg=(1.0,), rampup=0.0), **knobs})


@pytest.mark.parametrize("batch", [8, 100, 1000])
def test_half_life(batch):
    """After h images, in however many updates, the start weighs one half."""
    emas, h = {"ema_1k": {"w": jnp.ones(())}}, 1000
    for seen in range(0, h, batch):
        emas = average(emas, {"w": jnp.zeros(())}, seen, batch)
    assert float(emas["ema_1k"]["w"]) == pytest.approx(0.5, rel=1e-5)


def test_ramp_up():
    """beta = 0.5^(B / min(h, rampup seen)): a copy at first, then the ramp, then the full half-life."""
    beta = lambda seen: float(optim.ema_beta(jnp.float32(seen), 64, halflife_kimg=1.0, rampup=0.05))  # noqa: E731
    assert beta(0) == 0.0
    assert beta(640) == pytest.approx(0.5 ** (64 / 32), rel=1e-6)
    assert beta(20000) == pytest.approx(0.5 ** (64 / 1000), rel=1e-6) == beta(1e6)
    params = tree(4)
    first = average({"ema_1k": tree(5)}, params, 0, 64, rampup=0.05)["ema_1k"]
    assert tiny.difference(first, params) < 1e-6


def test_constants_stay_constant():
    """An average of what does not change is that, exactly, after any number of updates."""
    params = tree(6)
    emas = {"ema_1k": jax.tree.map(jnp.asarray, params)}
    for i in range(20):
        emas = average(emas, params, 64 * i, 64, rampup=0.05)
    jax.tree.map(np.testing.assert_array_equal, emas["ema_1k"], params)


def test_several_averages():
    """Each name has its own half-life, in the order given."""
    names = optim.ema_names((0.5, 2, 500.0))
    assert names == ("ema_0.5k", "ema_2k", "ema_500k")
    emas = {name: {"w": jnp.ones(())} for name in names}
    for seen in range(0, 2000, 500):
        emas = average(emas, {"w": jnp.zeros(())}, seen, 500, halflife_kimg=(0.5, 2, 500.0))
    weights = [float(emas[name]["w"]) for name in names]
    np.testing.assert_allclose(weights, [0.5**4, 0.5, 0.5 ** (2 / 500)], rtol=1e-5)
