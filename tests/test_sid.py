"""SiD against SIM, and against the Fisher divergence where both scores are exact (quadrature in 1-D)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sim_jax.objectives import sid, sim
from test_objectives import inputs, nets
from test_sim_closed_form import CASES_1D, TWO_MODES, expectation, float64, pushforward, relative, true_divergence  # noqa: F401  (float64 is a fixture)


@pytest.mark.parametrize("weighting,knobs", [("sid", {}), ("none", {}), ("paper", dict(sigma_power=-2.0))])
def test_alpha_one_is_sim_with_squared_l2(weighting, knobs):
    """L_SIM = 2 L_SiD, loss, gradient and divergence; at alpha = 1.2 it is not."""
    x0, noise, level = inputs()

    def ours(x0, alpha):
        loss, metrics = sid.pair_loss(
            nets(), x0, noise, level, None, alpha=alpha, weighting=weighting, **knobs)
        return 2 * jnp.sum(loss), metrics

    def theirs(x0):
        loss, metrics = sim.pair_loss(
            nets(), x0, noise, level, None, distance="squared_l2", weighting=weighting, **knobs)
        return jnp.sum(loss), metrics

    (value, metrics), gradient = jax.value_and_grad(theirs, has_aux=True)(x0)
    (same, same_metrics), same_gradient = jax.value_and_grad(ours, has_aux=True)(x0, 1.0)
    np.testing.assert_allclose(same, value, rtol=1e-5)
    np.testing.assert_allclose(same_gradient, gradient, rtol=1e-4, atol=1e-5)
    for name, metric in metrics.items():
        np.testing.assert_allclose(same_metrics[name], metric, rtol=1e-5)
    assert not np.allclose(jax.grad(ours, has_aux=True)(x0, 1.2)[0], gradient, rtol=1e-2)


@functools.cache
def compiled(alpha):
    """(theta, source, teacher) -> gradients of SiD, and of the Fisher divergence by scores and by measure."""
    def all_three(theta, source, teacher):
        fisher = functools.partial(true_divergence, radial=lambda n: n, space="x0")
        knobs = dict(pair_loss=sid.pair_loss, alpha=alpha, weighting="none")
        by_scores = jax.grad(fisher)(theta, source, teacher)
        in_full = jax.grad(functools.partial(fisher, hold=lambda p: p))(theta, source, teacher)
        return jax.grad(expectation)(theta, source, teacher, **knobs), by_scores, in_full - by_scores

    return jax.jit(all_three)


def gradients(case, alpha):
    source, teacher, theta = (jnp.asarray(part) for part in CASES_1D[case])
    return compiled(alpha)(theta, source, teacher)


@pytest.mark.parametrize("case", CASES_1D)
def test_alpha_one_is_the_fisher_divergence(case):
    """Its gradient through the generator's score, the sampling measure held fixed, as in SIM's theorem."""
    ours, by_scores, _ = gradients(case, 1.0)
    assert relative(2 * ours, by_scores) < 1e-7


@pytest.mark.parametrize("alpha", [0.5, 1.2])
@pytest.mark.parametrize("case", CASES_1D)
def test_other_alphas_move_the_measure(case, alpha):
    """2 grad L = grad_p F + 2 (1 - alpha) grad_pi F: at alpha = 1/2 the Fisher divergence in full."""
    ours, by_scores, by_measure = gradients(case, alpha)
    assert relative(2 * ours, by_scores + 2 * (1 - alpha) * by_measure) < 1e-7
    assert relative(2 * ours, by_scores) > 1e-3


@pytest.mark.parametrize("weighting", ["none", "sid"])
def test_vanishes_at_the_teachers_distribution(weighting):
    theta, source = jnp.asarray([-1.3, 0.4]), jnp.asarray(TWO_MODES)
    # the teacher's components in another order: the same distribution, another computation
    teacher = jnp.stack(pushforward(source, theta))[:, ::-1]
    gradient = jax.grad(expectation)(theta, source, teacher, pair_loss=sid.pair_loss, weighting=weighting)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-9)
