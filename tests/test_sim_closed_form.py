"""SIM against the divergence it claims to minimise, where both scores are exact.

The reference never touches the code under test: it differentiates d(s_p - s_q) itself, with the scores
taken by autodiff of the log-densities, the sampling measure held fixed, and d written out again in this
file.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sim_jax.objectives import distances, sim
from sim_jax.objectives.base import Nets
from sim_jax.types import NoiseLevel

stop = jax.lax.stop_gradient

# knobs of pair_loss, and the distance again as a function of n = ||y||^2
DISTANCES = {
    "pseudo_huber": (dict(distance="pseudo_huber", c=0.7), lambda n: jnp.sqrt(n + 0.49) - 0.7),
    "squared_l2": (dict(distance="squared_l2"), lambda n: n),
    "power_half": (dict(distance="power", p=0.5, eps=0.6), lambda n: (n + 0.36) ** 0.25 - 0.6**0.5),
    "power_1.5": (dict(distance="power", p=1.5, eps=0.4), lambda n: (n + 0.16) ** 0.75 - 0.4**1.5),
    "power_3": (dict(distance="power", p=3.0, eps=0.4), lambda n: (n + 0.16) ** 1.5 - 0.4**3),
    "l2": (dict(distance="l2", eps=0.5), lambda n: jnp.sqrt(n + 0.25) - 0.5),
}
# (alpha, sigma): variance exploding, variance preserving and neither
LEVELS = ((1.0, 0.5), (1.0, 2.0), (0.6, 0.8))
# mixtures of normals as (weights, means, variances), three components each: one compilation serves all
NORMAL = ((0.5, 0.3, 0.2), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
OTHER_NORMAL = ((0.5, 0.3, 0.2), (0.7, 0.7, 0.7), (1.9, 1.9, 1.9))
TWO_MODES = ((0.35, 0.4, 0.25), (-1.6, 1.1, 1.1), (0.3, 0.5, 0.5))
THREE_MODES = ((0.5, 0.2, 0.3), (-2.0, 0.2, 1.7), (0.4, 0.2, 0.6))
CASES_1D = {
    "normal_to_normal": (NORMAL, NORMAL, (1.6, 0.0)),
    "normal_to_shifted": (NORMAL, OTHER_NORMAL, (0.8, -0.4)),
    "mixture_to_normal": (TWO_MODES, NORMAL, (0.7, 0.3)),
    "mixture_to_mixture": (TWO_MODES, THREE_MODES, (1.2, -0.2)),
}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def pushforward(mixture, theta):
    """The mixture of theta[0] * z + theta[1]."""
    weights, means, variances = (jnp.asarray(part) for part in mixture)
    return weights, theta[0] * means + theta[1], theta[0] ** 2 * variances


def denoiser(mixture):
    """The exact D(x; s) = E[x0 | x] of a mixture in variance-exploding form, on [B,1,1,1]."""
    weights, means, variances = (jnp.asarray(part) for part in mixture)

    def apply(x, s, cond):
        x, s = x[:, :, :, 0, None], s[:, None, None, None]
        total = variances[None, None, None, :] + s**2
        gap = x - means[None, None, None, :]
        log_part = jnp.log(weights)[None, None, None, :] - gap**2 / (2 * total) - jnp.log(total) / 2
        posterior = means[None, None, None, :] + variances[None, None, None, :] / total * gap
        return jnp.sum(jax.nn.softmax(log_part, axis=-1) * posterior, axis=-1, keepdims=True)

    return apply


def discriminator(teacher, generated):
    """The exact logit log q(x; s) - log p(x; s) of two mixtures in variance-exploding form, [B,1] on [B,1,1,1]."""
    def apply(x, s, cond):
        def at(mixture):
            return jax.vmap(functools.partial(log_density, mixture, 1.0))(s, x[:, 0, 0, 0])

        return (at(teacher) - at(generated))[:, None]

    return apply


def log_density(mixture, alpha, sigma, x):
    """log p_t(x) of the noised mixture at a scalar x."""
    weights, means, variances = mixture
    total = alpha**2 * jnp.asarray(variances) + sigma**2
    gap = x - alpha * jnp.asarray(means)
    log_parts = jnp.log(jnp.asarray(weights)) - gap**2 / (2 * total) - jnp.log(2 * jnp.pi * total) / 2
    return jax.nn.logsumexp(log_parts)


def grid(span, step):
    """Trapezoidal nodes: on analytic integrands that decay, its error falls exponentially in 1 / step."""
    count = round(2 * span / step) + 1
    return np.linspace(-span, span, count), step


def true_divergence(theta, source, teacher, radial, space="score", sigma_power=0.0, levels=LEVELS, hold=stop):
    """sum over levels of w E_{x ~ hold[p_theta,t]} d(s_theta(x) - s_q(x)) as a function of theta."""
    nodes, step = grid(24.0, 0.06)
    current = pushforward(source, theta)

    def at_level(alpha, sigma):
        log_p = functools.partial(log_density, current, alpha, sigma)
        log_q = functools.partial(log_density, teacher, alpha, sigma)
        y = jax.vmap(jax.grad(log_p))(jnp.asarray(nodes)) - jax.vmap(jax.grad(log_q))(jnp.asarray(nodes))
        y = y * (sigma**2 / alpha if space == "x0" else 1.0)
        measure = step * hold(jnp.exp(jax.vmap(log_p)(jnp.asarray(nodes))))
        return (sigma / alpha) ** sigma_power * jnp.sum(measure * radial(y**2))

    return jnp.sum(jax.vmap(at_level)(*jnp.asarray(levels).T))


def expectation(theta, source, teacher, cut=(), levels=LEVELS, pair_loss=sim.pair_loss, **knobs):
    """sum over levels of E_{z, noise} of a generator's loss as a function of theta, all nodes as one batch.

    The fake score and the discriminator are exact and constant; `cut` names the networks whose input gradient is stopped.
    """
    z, z_step = grid(7.5, 0.15)
    noise, noise_step = grid(8.0, 0.16)
    density = jnp.exp(jax.vmap(functools.partial(log_density, source, 1.0, 0.0))(jnp.asarray(z))) * z_step
    gauss = np.exp(-(noise**2) / 2) / np.sqrt(2 * np.pi) * noise_step
    count = len(z) * len(noise)
    z_all, noise_all = (np.tile(part.ravel(), len(levels)) for part in np.meshgrid(z, noise, indexing="ij"))
    alpha, sigma = (jnp.repeat(jnp.asarray(part), count) for part in zip(*levels))
    x0 = (theta[0] * jnp.asarray(z_all) + theta[1])[:, None, None, None]
    generated = pushforward(source, stop(theta))
    nets = Nets(teacher=denoiser(teacher), fake=denoiser(generated), discriminate=discriminator(teacher, generated))
    nets = stop_inputs(nets, cut)
    noise_all = jnp.asarray(noise_all)[:, None, None, None]
    loss, _ = pair_loss(nets, x0, noise_all, NoiseLevel(sigma, alpha, sigma), None, **knobs)
    return jnp.sum(loss * jnp.tile(jnp.outer(density, gauss).ravel(), len(levels)))


def stop_inputs(nets, names):
    """`nets` with the input gradient of the named networks stopped."""
    def stopped(fn):
        return lambda x, s, cond: fn(stop(x), s, cond)

    return nets._replace(**{name: stopped(getattr(nets, name)) for name in names})


@functools.cache
def compiled(distance, space, cut=(), extra=(), levels=LEVELS):
    """(theta, source, teacher) -> (gradient of the SIM loss, gradient of the true divergence) in theta."""
    knobs, radial = DISTANCES[distance]
    power = dict(extra).get("sigma_power", 0.0)

    def both(theta, source, teacher):
        all_knobs = dict(space=space, **knobs, **dict(extra))
        ours = jax.grad(expectation)(theta, source, teacher, cut, levels, **all_knobs)
        return ours, jax.grad(true_divergence)(theta, source, teacher, radial, space, power, levels)

    return jax.jit(both)


def gradients(case, distance, space, cut=(), **extra):
    """`compiled` at a case of `CASES_1D`: theta is the generator's (scale, shift)."""
    source, teacher, theta = (jnp.asarray(part) for part in CASES_1D[case])
    return compiled(distance, space, cut, tuple(extra.items()))(theta, source, teacher)


def relative(ours, truth):
    return float(jnp.linalg.norm(ours - truth) / jnp.linalg.norm(truth))


@pytest.mark.parametrize("space", ["score", "x0"])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("case", CASES_1D)
def test_gradient_is_that_of_the_divergence_1d(case, distance, space):
    assert relative(*gradients(case, distance, space)) < 1e-7


def test_paper_weighting_is_inside_the_integral():
    extra = dict(weighting="paper", sigma_power=1.5)
    assert relative(*gradients("mixture_to_mixture", "pseudo_huber", "score", **extra)) < 1e-7


@pytest.mark.parametrize("cut", [("teacher",), ("fake",), ("teacher", "fake")])
def test_stopping_a_network_input_breaks_the_theorem(cut):
    """Negative control: the equality above is able to fail, and needs the gradient through both networks."""
    ours, truth = gradients("mixture_to_mixture", "pseudo_huber", "x0", cut)
    assert relative(ours, truth) > 0.05


def test_stopping_the_normaliser_breaks_the_theorem(monkeypatch):
    """Negative control: so is the square root of the pseudo-Huber distance."""
    def stopped(*, c):
        exact = distances.pseudo_huber(c=c)
        return exact._replace(gradient=lambda y: y * stop(exact.gradient(y) / y))

    monkeypatch.setitem(distances.TABLE, "pseudo_huber", stopped)
    source, teacher, theta = (jnp.asarray(part) for part in CASES_1D["mixture_to_mixture"])
    ours, truth = compiled.__wrapped__("pseudo_huber", "x0")(theta, source, teacher)
    assert relative(ours, truth) > 0.01


def test_sid_weighting_is_a_heuristic():
    """Negative control, and why weights.py says so: a detached per-sample weight is not w(t)."""
    ours, truth = gradients("mixture_to_mixture", "squared_l2", "x0", weighting="sid")
    cosine = jnp.vdot(ours, truth) / jnp.linalg.norm(ours) / jnp.linalg.norm(truth)
    assert 0.0 < cosine < 0.999


@pytest.mark.parametrize("scale,s", [(1.6, 0.5), (0.4, 2.0)])
def test_hand_computed_gradient(scale, s):
    """G = theta z, teacher N(0,1), d = y^2: 4 theta A / v with v = theta^2 + s^2, A = 1/(1 + s^2) - 1/v."""
    theta, source, v = jnp.asarray([scale, 0.0]), jnp.asarray(NORMAL), scale**2 + s**2
    ours, truth = compiled("squared_l2", "score", levels=((1.0, s),))(theta, source, source)
    expected = [4 * scale * (1 / (1 + s**2) - 1 / v) / v, 0.0]
    np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(truth, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("space", ["score", "x0"])
@pytest.mark.parametrize("distance", DISTANCES)
def test_vanishes_at_the_teachers_distribution_1d(distance, space):
    theta, source = jnp.asarray([-1.3, 0.4]), jnp.asarray(TWO_MODES)
    # the teacher's components in another order: the same distribution, another computation
    teacher = jnp.stack(pushforward(source, theta))[:, ::-1]
    ours, _ = compiled(distance, space)(theta, source, teacher)
    np.testing.assert_allclose(ours, 0.0, atol=1e-9)


@pytest.mark.parametrize("distance", ["pseudo_huber", "squared_l2", "l2"])
def test_descent_reaches_the_teacher(distance):
    """Gradient descent on SIM, an exact fake score at every step, ends at the teacher's mean and variance."""
    theta, source, teacher = (jnp.asarray(part) for part in ([0.5, -1.0], NORMAL, OTHER_NORMAL))
    for _ in range(60):
        theta = theta - 0.5 * compiled(distance, "x0")(theta, source, teacher)[0]
    np.testing.assert_allclose(theta, [np.sqrt(1.9), 0.7], atol=1e-3)
