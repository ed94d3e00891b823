"""Every method of the table against one contract, and the parts they are made of."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sim_jax import objectives
from sim_jax.objectives import distances, sim, weights
from sim_jax.objectives.base import Nets, Objective, denoise, diffuse, expand, mean_chw, score_scale, sum_chw
from sim_jax.types import Cond, NoiseLevel

# one row a method, and some of its knobs; a method without a row fails test_every_method_has_a_row
ROWS = {
    "sim": ("sim", {}),
    "sim_score_space": ("sim", dict(space="score", c=0.5)),
    "sim_squared_l2_sid": ("sim", dict(distance="squared_l2", weighting="sid")),
    "sim_power": ("sim", dict(distance="power", p=3.0, space="score", weighting="paper", sigma_power=2.0)),
    "sim_power_below_one": ("sim", dict(distance="power", p=0.5)),
    "sim_l2": ("sim", dict(distance="l2", space="score")),
    "sid": ("sid", {}),
    "sid_alpha_one_paper": ("sid", dict(alpha=1.0, weighting="paper", sigma_power=-1.0)),
    "diff_instruct": ("diff_instruct", {}),
    "diff_instruct_paper": ("diff_instruct", dict(weighting="paper", sigma_power=-2.0)),
    "dsm": ("dsm", {}),
    "dsm_mean": ("dsm", dict(reduction="mean", weighting="eps")),
}
# methods that differentiate neither network, not even for free parameters
EVALUATED_ONLY = {"diff_instruct"}
BATCH, SHAPE = 4, (4, 4, 2)
contract = pytest.mark.parametrize("method,knobs", ROWS.values(), ids=ROWS)


def network(params, x, sigma, cond):
    """A small denoiser in EDM's form that mixes the pixels of a sample, never samples."""
    s = expand(sigma, x)
    mixed = jnp.tanh((x / jnp.sqrt(s**2 + 0.25)).reshape(x.shape[0], -1) @ params["w"]).reshape(x.shape)
    return 0.25 / (s**2 + 0.25) * x + 0.5 * s / jnp.sqrt(s**2 + 0.25) * mixed


def make_params(seed):
    return {"w": 0.3 * jax.random.normal(jax.random.key(seed), (32, 32), jnp.float32)}


def inputs(sigma=(0.1, 0.5, 2.0, 10.0), alpha=None, seed=0):
    x0, noise = jax.random.normal(jax.random.key(seed), (2, BATCH, *SHAPE), jnp.float32)
    sigma = jnp.asarray(sigma, jnp.float32)
    alpha = jnp.ones_like(sigma) if alpha is None else jnp.asarray(alpha, jnp.float32)
    return 0.5 * x0, noise, NoiseLevel(sigma, alpha, sigma)


def nets(teacher=None, fake=None):
    return Nets(teacher=functools.partial(network, make_params(1) if teacher is None else teacher),
                fake=functools.partial(network, make_params(2) if fake is None else fake))


# The contract

def test_every_method_has_a_row():
    assert {method for method, _ in ROWS.values()} == set(objectives.TABLE)
    for name, objective in objectives.TABLE.items():
        assert isinstance(objective, Objective) and objective.name == name
        assert objective.needs <= {"teacher", "fake", "discriminator", "data"}
        assert (objective.critic_steps > 0) == (objective.critic_loss is not None)


@contract
def test_losses_are_per_sample(method, knobs):
    """[B] float32, and a sample's loss is the same alone as in a batch."""
    loss_fn = objectives.get(method, **knobs).pair_loss
    x0, noise, level = inputs()
    loss, metrics = loss_fn(nets(), x0, noise, level, Cond())
    assert metrics
    for value in (loss, *metrics.values()):
        assert value.shape == (BATCH,) and value.dtype == jnp.float32
    for i in range(BATCH):
        one = jax.tree.map(lambda leaf: leaf[i : i + 1], level)
        alone, alone_metrics = loss_fn(nets(), x0[i : i + 1], noise[i : i + 1], one, Cond())
        np.testing.assert_allclose(alone[0], loss[i], rtol=2e-5)
        for name, value in metrics.items():
            np.testing.assert_allclose(alone_metrics[name][0], value[i], rtol=2e-5, atol=1e-7)


@contract
def test_cond_reaches_every_network(method, knobs):
    seen = []

    def spy(x, sigma, cond):
        seen.append(cond)
        return 0.1 * x

    cond = Cond(class_labels=jnp.ones((BATCH, 3)))
    objective = objectives.get(method, **knobs)
    objective.pair_loss(Nets(teacher=spy, fake=spy), *inputs(), cond)
    assert len(seen) == len(objective.needs & {"teacher", "fake"}) and all(got is cond for got in seen)


@contract
def test_stopped_parameters_are_constants(method, knobs):
    """`stop_gradient` on the parameters, as the step does, zeroes their gradient and leaves x0's as it is."""
    loss_fn = objectives.get(method, **knobs).pair_loss
    x0, noise, level = inputs()

    def total(teacher, fake, x0, stop):
        return jnp.sum(loss_fn(nets(stop(teacher), stop(fake)), x0, noise, level, Cond())[0])

    args = (make_params(1), make_params(2), x0)
    gradient = functools.partial(jax.grad(total, argnums=(0, 1, 2)), *args)
    teacher, fake, by_x0 = gradient(jax.lax.stop_gradient)
    _, free_fake, free_by_x0 = gradient(lambda params: params)
    assert not teacher["w"].any() and not fake["w"].any()
    assert bool(free_fake["w"].any()) == (method not in EVALUATED_ONLY)
    np.testing.assert_array_equal(by_x0, free_by_x0)
    # a generator's loss must move x0; dsm's x0 is data, a constant
    assert bool(by_x0.any()) == ("teacher" in objectives.TABLE[method].needs)


@contract
@pytest.mark.parametrize("same", [False, True], ids=["apart", "at_initialisation"])
def test_finite_at_extreme_levels(method, knobs, same):
    """EDM's whole range in float32, also where fake score and teacher are still one network."""
    loss_fn = objectives.get(method, **knobs).pair_loss
    x0, noise, level = inputs((0.002, 0.02, 80.0, 80.0))
    fake = make_params(1 if same else 2)

    def total(x0, fake):
        loss, metrics = loss_fn(nets(fake=fake), x0, noise, level, Cond())
        return jnp.sum(loss), metrics

    (value, metrics), grads = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(x0, fake)
    for leaf in jax.tree.leaves((value, metrics, grads)):
        assert jnp.isfinite(leaf).all()
    if same and "teacher" in objectives.TABLE[method].needs:
        assert not grads[0].any()


@pytest.mark.parametrize("method,knobs", [row for row in ROWS.values() if row[1].get("space") != "score"])
def test_other_processes_are_rescaled(method, knobs):
    """(alpha, sigma) and the variance-exploding (1, sigma / alpha) give the same loss where only D enters.

    Scores scale with alpha: score space at alpha != 1 is pinned by quadrature in test_sim_closed_form.py.
    """
    loss_fn = objectives.get(method, **knobs).pair_loss
    alpha, sigma = np.array([0.9, 0.6, 0.3, 0.1]), np.array([0.2, 0.8, 0.9, 1.2])
    x0, noise, preserving = inputs(sigma, alpha)
    _, _, exploding = inputs(sigma / alpha)
    for a, b in zip(jax.tree.leaves(loss_fn(nets(), x0, noise, preserving, None)),
                    jax.tree.leaves(loss_fn(nets(), x0, noise, exploding, None))):
        np.testing.assert_allclose(a, b, rtol=1e-4)


# Looking up

@pytest.mark.parametrize("call,words", [
    (lambda: objectives.get("simm"), ["'simm'", ", ".join(objectives.TABLE), "did you mean 'sim'"]),
    (lambda: objectives.get("sim", distence="l2"), ["'distence'", "did you mean 'distance'", "sigma_power"]),
    (lambda: objectives.get("sim", distance="pseudo-huber"), ["did you mean 'pseudo_huber'", "squared_l2"]),
    (lambda: objectives.get("sim", distance=None), ["distance: got None"]),
    (lambda: objectives.get("sim", distance="squared_l2", c=0.1), ["distance 'squared_l2'", "'c'", "none"]),
    (lambda: objectives.get("sim", c=0.0), ["c: got 0.0", "0 < c"]),
    (lambda: objectives.get("sim", c=float("nan")), ["c: got nan"]),
    (lambda: objectives.get("sim", c="small"), ["c: got 'small'"]),
    (lambda: objectives.get("sim", distance="power", p=5.0), ["p: got 5.0", "0 < p <= 4"]),
    (lambda: objectives.get("sim", distance="l2", eps=-1.0), ["eps: got -1.0"]),
    (lambda: objectives.get("sim", space="eps"), ["space: got 'eps'", "x0, score"]),
    (lambda: objectives.get("sim", weighting="dmd"), ["weighting: got 'dmd'", "none, paper, sid"]),
    (lambda: objectives.get("sim", weighting="sid", sigma_power=1.0), ["weighting 'sid'", "'sigma_power'"]),
    (lambda: objectives.get("sim", critic_steps=0), ["critic_steps: got 0", ">= 1"]),
    (lambda: objectives.get("sim", critic={"sigma_dta": 1.0}), ["sim's critic", "did you mean 'sigma_data'"]),
    (lambda: objectives.get("sim", critic={"weighting": "sid"}), ["weighting: got 'sid'", "edm"]),
    (lambda: objectives.get("sid", alpha=float("inf")), ["alpha: got inf", "finite"]),
    (lambda: objectives.get("sid", alhpa=1.0), ["knob of sid", "did you mean 'alpha'"]),
    (lambda: objectives.get("sid", weighting="edm"), ["weighting: got 'edm'", "none, paper, sid"]),
    (lambda: objectives.get("diff_instruct", alpha=1.2), ["knob of diff_instruct", "weighting, sigma_power"]),
    (lambda: objectives.get("diff_instruct", sigma_power=1.0), ["weighting 'none'", "'sigma_power'"]),
    (lambda: objectives.get("dsm", sigma_data=0.0), ["sigma_data: got 0.0"]),
    (lambda: objectives.get("dsm", reduction="max"), ["reduction: got 'max'", "sum, mean"]),
    (lambda: objectives.get("dsm", critic_steps=2), ["critic of 'dsm'", "has no critic"]),
])
def test_bad_input_is_one_clear_line(call, words):
    with pytest.raises(ValueError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message and "allowed" in message
    for word in words:
        assert word in message


def test_get_binds_knobs_of_generator_and_critic():
    objective = objectives.get("sim", distance="l2", critic={"reduction": "mean"}, critic_steps=5)
    x0, noise, level = inputs()
    np.testing.assert_array_equal(objective.pair_loss(nets(), x0, noise, level, None)[0],
                                  sim.pair_loss(nets(), x0, noise, level, None, distance="l2")[0])
    summed = objectives.TABLE["sim"].critic_loss(nets(), x0, noise, level, None)[0]
    mean = objective.critic_loss(nets(), x0, noise, level, None)[0]
    np.testing.assert_allclose(mean, summed / 32, rtol=1e-6)
    assert objective.critic_steps == 5 and objectives.TABLE["sim"].critic_steps == 1


# Distances, weightings, spaces

@pytest.mark.parametrize("name,knobs", [
    ("pseudo_huber", dict(c=0.3)), ("squared_l2", {}), ("power", dict(p=0.5, eps=0.1)),
    ("power", dict(p=3.0)), ("power", dict(p=4.0)), ("l2", {}),
])
def test_gradient_of_a_distance(name, knobs):
    """d' is the derivative of d; d(0) = 0 and d'(0) = 0; d >= 0."""
    d = distances.get(name, **knobs)
    y = jax.random.normal(jax.random.key(0), (5, 3, 3, 2))
    y = y * expand(jnp.asarray([0.0, 1e-3, 0.1, 1.0, 10.0]), y)
    assert d.value(y).shape == (5,) and bool((d.value(y) >= 0).all())
    np.testing.assert_allclose(d.value(y)[0], 0.0, atol=1e-7)
    assert not d.gradient(y)[0].any()
    by_autodiff = jax.grad(lambda y: jnp.sum(d.value(y)))(y)
    np.testing.assert_allclose(d.gradient(y), by_autodiff, rtol=1e-5, atol=1e-7)


def test_distances_by_hand():
    """||y|| = 5 over all the elements of one sample."""
    y = jnp.asarray([3.0, 0.0, 0.0, 4.0]).reshape(1, 2, 2, 1)
    np.testing.assert_allclose(distances.get("pseudo_huber", c=12.0).value(y), [1.0], rtol=1e-6)
    np.testing.assert_allclose(distances.get("pseudo_huber", c=12.0).gradient(y), y / 13, rtol=1e-6)
    np.testing.assert_allclose(distances.get("squared_l2").value(y), [25.0])
    np.testing.assert_allclose(distances.get("squared_l2").gradient(y), 2 * y)
    np.testing.assert_allclose(distances.get("l2").value(y), [5.0], rtol=1e-4)
    np.testing.assert_allclose(distances.get("l2").gradient(y), y / 5, rtol=1e-6)
    np.testing.assert_allclose(distances.get("power", p=3.0).value(y), [125.0], rtol=1e-6)
    np.testing.assert_allclose(distances.get("power", p=3.0).gradient(y), 15 * y, rtol=1e-6)


def test_distances_meet():
    """power(2) = squared_l2, l2(eps) = pseudo_huber(eps), pseudo_huber(c) -> squared_l2 / 2c at large c."""
    y = jax.random.normal(jax.random.key(1), (6, 4, 4, 2))
    squared, power = distances.get("squared_l2"), distances.get("power", p=2.0)
    l2, huber = distances.get("l2", eps=0.3), distances.get("pseudo_huber", c=0.3)
    wide = distances.get("pseudo_huber", c=1e3)
    np.testing.assert_allclose(power.gradient(y), squared.gradient(y), rtol=1e-6)
    np.testing.assert_allclose(l2.gradient(y), huber.gradient(y), rtol=1e-6)
    np.testing.assert_allclose(2e3 * wide.value(y), squared.value(y), rtol=1e-4)


def test_weightings_by_hand():
    level = NoiseLevel(*jnp.asarray([[0.0, 0.0], [1.0, 0.5], [2.0, 2.0]]))
    x0 = jnp.zeros((2, 2, 2, 1))
    real = x0.at[0, 0, :, 0].set(jnp.asarray([1.0, -3.0]))
    np.testing.assert_array_equal(weights.get("none")(level, x0, real), [1.0, 1.0])
    np.testing.assert_allclose(weights.get("paper", sigma_power=2.0)(level, x0, real), [4.0, 16.0], rtol=1e-6)
    np.testing.assert_allclose(weights.get("sid")(level, x0, real), [1.0, 1e5], rtol=1e-6)
    assert not jax.grad(lambda x: weights.get("sid")(level, x, real).sum())(x0).any()


def test_spaces_differ_by_weight_and_c():
    """L_score(w, c) = L_x0(w k, c / k), k = 1 / sigma^2: at one level, c' = c sigma^2 and w' = w sigma^-2."""
    sigma, c = 3.0, 0.2
    x0, noise, level = inputs((sigma,) * BATCH)
    score, _ = sim.pair_loss(nets(), x0, noise, level, None, space="score", c=c)
    knobs = dict(c=c * sigma**2, weighting="paper", sigma_power=-2.0)
    images, _ = sim.pair_loss(nets(), x0, noise, level, None, space="x0", **knobs)
    np.testing.assert_allclose(score, images, rtol=1e-5)


def test_sim_is_written_in_scores():
    """The x0 form equals - d'(y)^T (s_psi - grad log q_t(x_t|x0)), scores spelled out, at alpha != 1."""
    x0, noise, level = inputs((0.4, 0.8, 1.0, 1.3), (0.9, 0.6, 0.8, 0.3))
    alpha, sigma = expand(level.alpha, x0), expand(level.sigma, x0)
    x_t = alpha * x0 + sigma * noise
    fake = (alpha * denoise(nets().fake, x_t, level, None) - x_t) / sigma**2
    real = (alpha * denoise(nets().teacher, x_t, level, None) - x_t) / sigma**2
    y = fake - real
    expected = -sum_chw(y / jnp.sqrt(expand(sum_chw(y**2), y) + 0.7**2) * (fake + noise / sigma))
    loss, metrics = sim.pair_loss(nets(), x0, noise, level, None, space="score", c=0.7)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["divergence"], jnp.sqrt(sum_chw(y**2) + 0.49) - 0.7, rtol=1e-4)
    in_scores = metrics["score_divergence"] * score_scale(level) ** 2
    np.testing.assert_allclose(in_scores, mean_chw(y**2), rtol=1e-4)
