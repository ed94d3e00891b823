"""Training steps on one device: against hand-written steps, finite differences, and themselves cut into micro-batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tiny
from sim_jax import draws, steps
from sim_jax.data import labels
from sim_jax.types import Cond

KEY = jax.random.key(11)


def jitted(made):
    return jax.jit(functools.partial(steps.train_step, made), static_argnames=("update_critic", "update_generator"))


@functools.cache
def sim_setup():
    """A SIM recipe with plain gradient descent, its state, the teacher's parameters and the jitted step."""
    net = tiny.PixelNet()
    made = tiny.recipe(net, optimizer=optax.sgd(0.01))
    return net, made, tiny.host_state(made), tiny.random_params(net.shapes(), 3), jitted(made)


def documented(step: int, turn: str, batch: int = 8):
    """What the documented keys give each sample, drawn one by one: z, noise, a standard normal for the level, a class."""
    def each(purpose, draw):
        return np.stack([draw(tiny.sample_key(KEY, step, f"{turn}/{purpose}", i)) for i in range(batch)])

    image = lambda key: jax.random.normal(key, (4, 4, 1))  # noqa: E731
    return (each("z", image), each("noise", image), each("level", jax.random.normal),
            each("label", lambda key: jax.random.randint(key, (), 0, 3)))


@functools.cache
def accumulated(micro_batches: int, loop: str, dropout: float = 0.3):
    net = tiny.PixelNet(dropout=dropout)
    made = tiny.recipe(net, micro_batches=micro_batches, loop=loop)
    return tiny.run(jitted(made), tiny.host_state(made), tiny.random_params(net.shapes(), 3), count=2, key=KEY)


@pytest.mark.parametrize("loop", ["python", "scan"])
@pytest.mark.parametrize("micro_batches", [2, 4])
def test_accumulation_changes_nothing(micro_batches, loop):
    """Same samples, same dropout masks, same mean, whether a batch is taken whole or in pieces."""
    whole, whole_metrics = accumulated(1, "python")
    pieces, metrics = accumulated(micro_batches, loop)
    assert tiny.difference(pieces, whole) < 1e-5
    for name, value in whole_metrics.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5), name


def test_dropout_is_on_in_training():
    """The check above would pass without dropout: with it, another step is taken."""
    without = accumulated(1, "python", 0.0)[0]
    assert tiny.difference(accumulated(1, "python")[0].generator.params, without.generator.params) > 1e-4


@pytest.mark.parametrize("source", ["generator", "data", "augmented"])
def test_critic_step_is_a_hand_written_dsm_step(source):
    """psi <- psi - lr d/dpsi mean_i lambda(s_i) |D(x0_i + s_i n_i) - x0_i|^2, lambda = (s^2 + 1/4) / (s/2)^2."""
    net, made, state, teacher, _ = sim_setup()
    state = state.replace(step=np.int32(5))
    z, noise, normal, classes = documented(5, "critic")
    cond, batch = Cond(class_labels=np.eye(3, dtype=np.float32)[classes]), None
    x0 = net.bind(state.generator.params)(2.5 * z, np.full(8, 2.5, np.float32), cond)
    if source == "data":
        made = tiny.recipe(net, method="dsm", optimizer=optax.sgd(0.01))
        state = tiny.host_state(made).replace(step=np.int32(5))
        batch = {"image": np.float32(0.1 * z), "label": (classes + 1) % 3}
        x0, cond = batch["image"], Cond(class_labels=np.eye(3, dtype=np.float32)[batch["label"]])
    if source == "augmented":
        made = tiny.recipe(net, optimizer=optax.sgd(0.01), augment=lambda keys, x: (1 - 0.5 * x, jnp.zeros((8, 9))))
        x0 = 1 - 0.5 * x0
    sigma = np.exp(-1.2 + 1.2 * normal)

    def loss(params):
        denoised = net.bind(params)(x0 + sigma[:, None, None, None] * noise, sigma, cond)
        return jnp.mean((sigma**2 + 0.25) / (0.5 * sigma) ** 2 * jnp.sum((denoised - x0) ** 2, (1, 2, 3)))

    value, grads = jax.jit(jax.value_and_grad(loss))(state.fake_score.params)
    expected = jax.tree.map(lambda p, g: p - 0.01 * g, state.fake_score.params, grads)
    moved, metrics = jax.jit(functools.partial(steps.critic_update, made))(state, teacher, KEY, batch)
    assert tiny.difference(moved.fake_score.params, expected) < 1e-5
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-5)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(jax.tree.map(np.asarray, grads))))
    assert float(metrics["grad_norm"]) == pytest.approx(float(norm), rel=1e-5)


def test_adam_step_of_the_critic():
    """Adam with b1 = 0 moves by lr g / (|g| + eps) in its first step, whatever the gradient's size."""
    net, made, state, teacher, _ = sim_setup()
    plain, _ = jax.jit(functools.partial(steps.critic_update, made))(state, teacher, KEY, None)
    adam = tiny.recipe(net, lr=1e-3)
    moved, _ = jax.jit(functools.partial(steps.critic_update, adam))(tiny.host_state(adam), teacher, KEY, None)
    for before, descended, after in zip(*(jax.tree.leaves(s.fake_score.params) for s in (state, plain, moved)), strict=True):
        grads = (np.float64(before) - np.asarray(descended)) / 0.01
        sure = np.abs(grads) > 1e-3
        assert sure.mean() > 0.9
        np.testing.assert_allclose((np.asarray(after) - before)[sure], -1e-3 * np.sign(grads)[sure], rtol=2e-3, atol=1e-7)


def test_generator_gradient_is_a_finite_difference():
    """In float64, along one random direction, with everything drawn held fixed."""
    with jax.enable_x64(True):
        net, _, state, teacher, _ = sim_setup()
        made = tiny.recipe(net, optimizer=optax.sgd(1.0))
        double = lambda tree: jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), tree)  # noqa: E731
        params, fake, teacher = double(state.generator.params), double(state.fake_score.params), double(teacher)
        direction = double(tiny.random_params(net.shapes(), 9))

        @jax.jit
        def update(params):
            moving = state.replace(generator=state.generator.replace(params=params, ema={}),
                                   fake_score=state.fake_score.replace(params=fake))
            moved, metrics = steps.generator_update(made, moving, teacher, KEY)
            return metrics["loss"], jax.tree.map(lambda p, q: p - q, params, moved.generator.params)

        def at(h):
            return float(update(jax.tree.map(lambda p, v: p + h * v, params, direction))[0])

        slope = (at(1e-5) - at(-1e-5)) / 2e-5
        grads = update(params)[1]
        analytic = sum(float(jnp.vdot(g, v)) for g, v in zip(jax.tree.leaves(grads), jax.tree.leaves(direction), strict=True))
        assert abs(slope) > 1e-3
        assert analytic == pytest.approx(slope, rel=1e-6)


def test_who_moves_when():
    """Critic alone: the generator and its average stay, bit for bit. Both: each moves once, the other's parameters constant."""
    _, _, state, teacher, step = sim_setup()
    same = functools.partial(jax.tree.map, np.testing.assert_array_equal)
    critic, metrics = step(state, teacher, KEY, update_generator=False)
    same(critic.generator, state.generator)
    assert (int(critic.step), int(critic.fake_score.step), int(critic.generator.step)) == (1, 1, 0)
    assert all(name.startswith("fake_score/") for name in metrics)
    assert min(jax.tree.leaves(jax.tree.map(lambda a, b: float(np.abs(a - b).max()), critic.fake_score.params, state.fake_score.params))) > 0

    both, metrics = step(state, teacher, KEY)
    assert (int(both.step), int(both.fake_score.step), int(both.generator.step)) == (1, 1, 1)
    assert tiny.difference(both.fake_score.params, critic.fake_score.params) < 1e-6
    assert min(jax.tree.leaves(jax.tree.map(lambda a, b: float(np.abs(a - b).max()), both.generator.params, state.generator.params))) > 0
    assert {"generator/loss", "generator/grad_norm", "fake_score/loss", "fake_score/grad_norm"} <= metrics.keys()


def test_generator_meets_the_moved_critic():
    """Fake score first, then the generator against it: a step is the critic's update followed by the generator's."""
    _, made, state, teacher, step = sim_setup()
    both, _ = step(state, teacher, KEY)
    critic, _ = step(state, teacher, KEY, update_generator=False)
    alone = jax.jit(functools.partial(steps.generator_update, made))
    after, _ = alone(critic.replace(step=np.int32(0)), teacher, KEY)
    before, _ = alone(state, teacher, KEY)
    assert tiny.difference(both.generator.params, after.generator.params) < 1e-6
    assert tiny.difference(both.generator.params, before.generator.params) > 1e-6


def test_average_moves_once_per_generator_update():
    """ema <- ema + (1 - 0.5^(B/h)) (theta - ema), B = 8 images, h = 20: in generator updates, not iterations."""
    _, _, state, teacher, step = sim_setup()
    beta = 0.5 ** (8 / 20)
    ema = state.generator.ema["ema_0.02k"]
    for update_generator in (False, True, True):
        state, _ = step(state, teacher, KEY, update_generator=update_generator)
        if update_generator:
            ema = jax.tree.map(lambda e, p: beta * np.float64(e) + (1 - beta) * np.asarray(p), ema, state.generator.params)
        assert tiny.difference(state.generator.ema["ema_0.02k"], ema) < 1e-6
    assert not state.fake_score.ema


def test_teacher_training_averages_the_denoiser():
    """Under dsm the trained network is `fake_score`, keeps the average, and there is no generator."""
    net = tiny.PixelNet()
    made = tiny.recipe(net, method="dsm", optimizer=optax.sgd(0.01))
    state = tiny.host_state(made)
    batch = {"image": np.zeros((8, 4, 4, 1), np.float32), "label": np.arange(8) % 3}
    new, metrics = jitted(made)(state, None, KEY, batch)
    beta = 0.5 ** (8 / 20)
    expected = jax.tree.map(lambda e, p: beta * e + (1 - beta) * np.asarray(p), state.fake_score.ema["ema_0.02k"], new.fake_score.params)
    assert tiny.difference(new.fake_score.ema["ema_0.02k"], expected) < 1e-6
    assert new.generator is None and set(metrics) == {"denoiser/loss", "denoiser/denoising_error", "denoiser/grad_norm"}


def test_draws_are_fresh_and_apart():
    """No two of (turn, purpose, iteration, sample) share their noise."""
    seen = [documented(step, turn)[kind] for step in (0, 1) for turn in ("critic", "generator") for kind in (0, 1)]
    flat = np.concatenate([a.reshape(8, -1) for a in seen])
    correlation = np.abs(np.corrcoef(flat)) - np.eye(len(flat))
    assert correlation.max() < 0.95
    net, made, state, *_ = sim_setup()
    x0, cond = draws.generate(made, state.generator.params, KEY, jnp.int32(1), "generator", {"index": jnp.arange(8, dtype=jnp.uint32)})
    z, _, _, classes = documented(1, "generator")
    expected = net.bind(state.generator.params)(2.5 * z, np.full(8, 2.5, np.float32), cond)
    np.testing.assert_allclose(x0, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.argmax(cond.class_labels, 1), classes)


def test_histogram_labels_reach_the_generator():
    """`labels` decides the classes: with all weight on one class, nothing else is asked for."""
    net = tiny.PixelNet()
    made = tiny.recipe(net, labels=labels.make("histogram", 3, histogram=(0.0, 0.0, 1.0)))
    params = tiny.host_state(made).generator.params
    _, cond = draws.generate(made, params, KEY, jnp.int32(0), "critic", {"index": jnp.arange(8, dtype=jnp.uint32)})
    np.testing.assert_array_equal(cond.class_labels, np.eye(3)[[2] * 8])
