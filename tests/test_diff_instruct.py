"""Diff-Instruct against the integral KL divergence where both scores are exact (quadrature in 1-D)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sim_jax.objectives import diff_instruct, sim
from sim_jax.objectives.base import denoise, diffuse
from test_objectives import inputs, nets
from test_sim_closed_form import (  # noqa: F401  (float64 is a fixture)
    CASES_1D,
    LEVELS,
    NORMAL,
    OTHER_NORMAL,
    TWO_MODES,
    expectation,
    float64,
    grid,
    log_density,
    pushforward,
    relative,
)

# knobs of pair_loss, and the power of sigma / alpha that they weigh the KL divergence with
WEIGHTS = {
    "none": (dict(weighting="none"), 2.0),
    "plain_kl": (dict(weighting="paper", sigma_power=-2.0), 0.0),
}


def integral_kl(theta, source, teacher, power):
    """sum over levels of (sigma / alpha)^power KL(p_theta,t || q_t), nothing held fixed."""
    nodes, step = grid(24.0, 0.06)
    current = pushforward(source, theta)

    def at_level(alpha, sigma):
        log_p = jax.vmap(functools.partial(log_density, current, alpha, sigma))(jnp.asarray(nodes))
        log_q = jax.vmap(functools.partial(log_density, teacher, alpha, sigma))(jnp.asarray(nodes))
        return (sigma / alpha) ** power * step * jnp.sum(jnp.exp(log_p) * (log_p - log_q))

    return jnp.sum(jax.vmap(at_level)(*jnp.asarray(LEVELS).T))


@functools.cache
def compiled(weights):
    """(theta, source, teacher) -> (gradient of the loss, gradient of the divergence) in theta."""
    knobs, power = WEIGHTS[weights]
    loss = functools.partial(expectation, pair_loss=diff_instruct.pair_loss, **knobs)
    return jax.jit(lambda *args: (jax.grad(loss)(*args), jax.grad(integral_kl)(*args, power)))


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("case", CASES_1D)
def test_gradient_is_that_of_the_integral_kl(case, weights):
    source, teacher, theta = (jnp.asarray(part) for part in CASES_1D[case])
    assert relative(*compiled(weights)(theta, source, teacher)) < 1e-7


def test_weightings_of_the_levels_differ():
    """Negative control: the equality above is able to fail."""
    source, teacher, theta = (jnp.asarray(part) for part in CASES_1D["mixture_to_mixture"])
    ours, _ = compiled("none")(theta, source, teacher)
    _, truth = compiled("plain_kl")(theta, source, teacher)
    assert relative(ours, truth) > 0.1


@pytest.mark.parametrize("weights", WEIGHTS)
def test_vanishes_at_the_teachers_distribution(weights):
    theta, source = jnp.asarray([-1.3, 0.4]), jnp.asarray(TWO_MODES)
    # the teacher's components in another order: the same distribution, another computation
    teacher = jnp.stack(pushforward(source, theta))[:, ::-1]
    np.testing.assert_allclose(compiled(weights)(theta, source, teacher)[0], 0.0, atol=1e-9)


def test_descent_reaches_the_teacher():
    """Gradient descent with an exact fake score at every step ends at the teacher's mean and variance."""
    theta, source, teacher = (jnp.asarray(part) for part in ([0.5, -1.0], NORMAL, OTHER_NORMAL))
    for _ in range(60):
        theta = theta - 0.5 * compiled("none")(theta, source, teacher)[0]
    np.testing.assert_allclose(theta, [np.sqrt(1.9), 0.7], atol=1e-3)


def test_gradient_is_the_difference_of_the_predictions():
    """d loss / d x0 = w' (D_fake - D_real), to the last bit: nothing comes through the networks."""
    x0, noise, level = inputs((0.1, 0.5, 2.0, 10.0), (1.0, 0.8, 0.6, 0.5))
    gradient = jax.grad(lambda x: jnp.sum(diff_instruct.pair_loss(nets(), x, noise, level, None)[0]))(x0)
    x_t = diffuse(x0, noise, level)
    expected = denoise(nets().fake, x_t, level, None) - denoise(nets().teacher, x_t, level, None)
    np.testing.assert_array_equal(gradient, expected)


def test_networks_have_no_backward_pass():
    """The loss and its gradient cost what the loss alone costs; SIM's gradient about as much again."""
    both = nets()

    def flops(pair_loss, transform):
        def total(x0, noise, level):
            return jnp.sum(pair_loss(both, x0, noise, level, None)[0])

        return jax.jit(transform(total)).lower(*inputs()).compile().cost_analysis()["flops"]

    def ratio(pair_loss):
        return flops(pair_loss, jax.value_and_grad) / flops(pair_loss, lambda fn: fn)

    assert ratio(diff_instruct.pair_loss) < 1.1
    assert ratio(sim.pair_loss) > 1.6
