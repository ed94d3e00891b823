"""DMD2's loss against the integral KL divergence, and its pseudo-target and normaliser by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sim_jax import objectives
from sim_jax.objectives import diff_instruct, dmd2
from sim_jax.objectives.base import denoise, diffuse, expand, mean_chw, pseudo_target_loss
from test_diff_instruct import integral_kl
from test_objectives import inputs, nets
from test_sim_closed_form import CASES_1D, expectation, float64, relative  # noqa: F401  (float64 is a fixture)


@pytest.mark.parametrize("knobs,power", [(dict(weighting="none"), 2.0), (dict(weighting="paper", sigma_power=-2.0), 0.0)])
@pytest.mark.parametrize("case", CASES_1D)
def test_gradient_is_that_of_the_integral_kl(case, knobs, power):
    """Without the normaliser; one element a sample, so that both reductions are the same."""
    source, teacher, theta = (jnp.asarray(part) for part in CASES_1D[case])
    ours = jax.grad(expectation)(theta, source, teacher, pair_loss=dmd2.pair_loss, **knobs)
    assert relative(ours, jax.grad(integral_kl)(theta, source, teacher, power)) < 1e-7


def test_the_normaliser_is_a_heuristic():
    """Negative control, and why weights.py says so: with it the gradient is another one, of much the same direction.

    In one dimension the mean of 1 / |x0 - D_real| is infinite, so normaliser_eps is not small here.
    """
    source, teacher, theta = (jnp.asarray(part) for part in CASES_1D["mixture_to_mixture"])
    ours = jax.grad(expectation)(theta, source, teacher, pair_loss=dmd2.pair_loss, normaliser_eps=0.5)
    truth = jax.grad(integral_kl)(theta, source, teacher, 1.0)
    cosine = jnp.vdot(ours, truth) / jnp.linalg.norm(ours) / jnp.linalg.norm(truth)
    assert 0.5 < cosine < 0.999


@pytest.mark.parametrize("reduction,elements", [("mean", 32), ("sum", 1)])
def test_gradient_by_hand(reduction, elements):
    """dL/dx0 = (D_fake - D_real) / (mean |x0 - D_real| + eps) / N, and L = N (dL/dx0)^2 / 2."""
    x0, noise, level = inputs((0.1, 0.5, 2.0, 10.0), (1.0, 0.8, 0.6, 0.5))
    scale = jnp.asarray([1.0, 2.0, 0.5, 3.0])

    def total(x0):
        loss, _ = dmd2.pair_loss(nets(), x0, noise, level, None, scale, normaliser_eps=0.1, reduction=reduction)
        return jnp.sum(loss), loss

    gradient, loss = jax.grad(total, has_aux=True)(x0)
    x_t = diffuse(x0, noise, level)
    fake, real = denoise(nets().fake, x_t, level, None), denoise(nets().teacher, x_t, level, None)
    expected = expand(scale / (mean_chw(jnp.abs(x0 - real)) + 0.1), x0) * (fake - real) / elements
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)
    np.testing.assert_allclose(loss, 0.5 * elements * jnp.sum(expected**2, axis=(1, 2, 3)), rtol=1e-5)


def test_without_the_normaliser_it_is_diff_instruct():
    x0, noise, level = inputs()
    ours = jax.grad(lambda x: jnp.sum(
        dmd2.pair_loss(nets(), x, noise, level, None, weighting="none", reduction="sum")[0]))(x0)
    theirs = jax.grad(lambda x: jnp.sum(diff_instruct.pair_loss(nets(), x, noise, level, None)[0]))(x0)
    np.testing.assert_array_equal(ours, theirs)


def test_dmd_has_dmd2s_gradient():
    np.testing.assert_array_equal(objectives.get("dmd").pair_loss(nets(), *inputs(), None)[0],
                                  objectives.get("dmd2").pair_loss(nets(), *inputs(), None)[0])
    assert "pairs" in objectives.TABLE["dmd"].needs and objectives.TABLE["dmd"].critic_steps == 1


def test_a_teacher_that_is_right_gives_no_gradient():
    """mean |x0 - D_real| = 0: zero without an eps, where nan_to_num makes 3e38 of it; large but finite with one."""
    x0, noise, level = inputs()

    def gradient(eps):
        networks = nets()._replace(teacher=lambda x, s, cond: x0)
        return jax.grad(lambda x: jnp.sum(dmd2.pair_loss(networks, x, noise, level, None, normaliser_eps=eps)[0]))(x0)

    assert not gradient(0.0).any()
    assert bool(jnp.isfinite(gradient(1e-6)).all()) and bool(gradient(1e-6).any())


def test_pseudo_target_keeps_small_gradients():
    """A gradient far below the rounding of x0 comes through to the last bit."""
    x0 = 1.0 + jax.random.uniform(jax.random.key(0), (2, 4, 4, 1), jnp.float32)
    small = 1e-12 * jax.random.normal(jax.random.key(1), x0.shape, jnp.float32)
    got = jax.grad(lambda x: jnp.sum(pseudo_target_loss(x, small, reduction="sum")))(x0)
    np.testing.assert_array_equal(got, small)


def test_networks_have_no_backward_pass():
    """The loss and its gradient cost what the loss alone costs."""
    both = nets()

    def flops(transform):
        def total(x0, noise, level):
            return jnp.sum(dmd2.pair_loss(both, x0, noise, level, None)[0])

        return jax.jit(transform(total)).lower(*inputs()).compile().cost_analysis()["flops"]

    assert flops(jax.value_and_grad) < 1.1 * flops(lambda fn: fn)
