"""f-distill and Uni-Instruct against the f-divergences that they name, density ratio and scores exact (quadrature in 1-D).

The reference writes every f again and differentiates it; it takes neither h nor any loss from the code under test.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sim_jax.objectives import f_distill, f_divergences, sid, uni
from test_objectives import inputs, nets
from test_sim_closed_form import CASES_1D, LEVELS, NORMAL, TWO_MODES, expectation, float64, grid, log_density, pushforward, relative  # noqa: F401  (float64 is a fixture)

# name -> (f, whose divergence is D_f(q || p) = E_p f(q / p))
GENERATORS = {
    "rkl": lambda r: -jnp.log(r),
    "kl": lambda r: r * jnp.log(r),
    "jf": lambda r: (r - 1) * jnp.log(r),
    "js": lambda r: r * jnp.log(r) - (1 + r) * jnp.log((1 + r) / 2),
    "sf": lambda r: (1 + r) * jnp.log((1 + r) / (2 * r)),
    "neyman": lambda r: (1 - r) ** 2 / (2 * r),
    "sh": lambda r: 2 * (1 - jnp.sqrt(r)) ** 2,
    "chi2": lambda r: (r - 1) ** 2,
}
ALIASES = {"fkl": "kl", "jeffreys": "jf"}
UNCLIPPED = dict(ratio_lower=1e-60, ratio_upper=1e60)
F_DISTILL = dict(pair_loss=f_distill.pair_loss, weighting="none", normalise_ratio=False, normalise_weight=False, **UNCLIPPED)
UNI = dict(pair_loss=uni.pair_loss, weighting="none", **UNCLIPPED)
# of nearly equal tails: chi2 and neyman are finite
CASES = {"mixture_to_mixture": CASES_1D["mixture_to_mixture"], "mixture_to_normal": (TWO_MODES, NORMAL, (1.4, 0.3))}


def densities(theta, source, teacher, alpha, sigma):
    """(p, r, y^2) on a grid, and its step: the noised densities, their ratio q / p and the squared score difference."""
    nodes, step = grid(24.0, 0.06)
    log_p = functools.partial(log_density, pushforward(source, theta), alpha, sigma)
    log_q = functools.partial(log_density, teacher, alpha, sigma)

    def at(x):
        y = jax.grad(log_p)(x) - jax.grad(log_q)(x)
        return jnp.exp(log_p(x)), jnp.exp(log_q(x) - log_p(x)), y**2

    return *jax.vmap(at)(jnp.asarray(nodes)), step


def divergence(theta, source, teacher, f, alpha, sigma):
    """D_f(q_t || p_theta,t)."""
    p, r, _, step = densities(theta, source, teacher, alpha, sigma)
    return step * jnp.sum(p * f(r))


def expanded(theta, source, teacher, f, alpha, sigma):
    """E_p [ r^2 f''(r) y^2 ], nothing held fixed."""
    p, r, squared, step = densities(theta, source, teacher, alpha, sigma)
    return step * jnp.sum(p * r**2 * jax.vmap(jax.grad(jax.grad(f)))(r) * squared)


def over_levels(value, power):
    """theta -> sum over levels of (sigma / alpha)^power value, with sigma^2 / alpha for a difference of scores in x0-space."""
    def total(theta, source, teacher, f):
        return sum((sigma**power / alpha**2) * value(theta, source, teacher, f, alpha, sigma) for alpha, sigma in LEVELS)

    return total


@functools.cache
def compiled(loss, names, **extra):
    """(theta, source, teacher) -> {name: (gradient of the loss, gradient of what it stands for)}, all in one compilation."""
    knobs, truth = (F_DISTILL, over_levels(divergence, 2)) if loss == "f_distill" else (UNI, over_levels(expanded, 4))

    def all_of_them(*args):
        def both(name):
            return jax.grad(functools.partial(expectation, divergence=name, **knobs, **extra))(*args), jax.grad(truth)(
                *args, GENERATORS[name])

        return {name: both(name) for name in names}

    return jax.jit(all_of_them)


@functools.cache
def gradients(loss, case="mixture_to_mixture", names=tuple(GENERATORS), **extra):
    return compiled(loss, names, **extra)(*(jnp.asarray(part) for part in (CASES[case][2], *CASES[case][:2])))


def test_every_divergence_is_here():
    assert set(f_divergences.TABLE) == {*GENERATORS, *ALIASES}


@pytest.mark.parametrize("name", f_divergences.TABLE)
def test_weight_is_the_curvature(name):
    """h(r) = r^2 f''(r), f convex with f(1) = 0."""
    r, f = jnp.geomspace(0.05, 30.0, 25), GENERATORS[ALIASES.get(name, name)]
    np.testing.assert_allclose(f_divergences.TABLE[name](r), r**2 * jax.vmap(jax.grad(jax.grad(f)))(r), rtol=1e-9)
    assert float(f(1.0)) == 0.0 and bool((f_divergences.TABLE[name](r) > 0).all())


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("case", CASES)
def test_f_distill_is_the_gradient_of_the_f_divergence(case, name):
    assert relative(*gradients("f_distill", case)[name]) < 1e-7


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("case", CASES)
def test_uni_is_the_gradient_of_the_expanded_f_divergence(case, name):
    assert relative(*gradients("uni", case)[name]) < 1e-7


@pytest.mark.parametrize("name", GENERATORS)
def test_divergences_expand_along_the_diffusion(name):
    """d D_f / d(sigma^2) = - E_p [ r^2 f'' y^2 ] / 2: what `uni` integrates is D_f itself."""
    source, teacher, theta = (jnp.asarray(part) for part in CASES["mixture_to_mixture"])
    slope = jax.grad(lambda v: divergence(theta, source, teacher, GENERATORS[name], 1.0, jnp.sqrt(v)))(0.49)
    np.testing.assert_allclose(slope, -0.5 * expanded(theta, source, teacher, GENERATORS[name], 1.0, 0.7), rtol=1e-8)


def test_divergences_differ():
    """Negative control: the equalities above are able to fail."""
    for loss in ("f_distill", "uni"):
        truths = jnp.stack([truth for _, truth in gradients(loss).values()])
        apart = jnp.linalg.norm(truths[:, None] - truths[None], axis=-1) / jnp.linalg.norm(truths, axis=-1)[None]
        assert float(jnp.min(apart + jnp.eye(len(truths)))) > 1e-3


def test_constant_ratio_is_exact_for_reverse_kl_only():
    """Negative control: the ratio's own gradient is a part of the theorem."""
    for name, pair in gradients("uni", names=("rkl", "kl", "chi2", "js"), ratio_gradient="none").items():
        assert relative(*pair) < 1e-7 if name == "rkl" else relative(*pair) > 0.02


def test_what_uni_differentiates():
    """Both networks; of the discriminator its value alone, as the scores know the ratio's gradient."""
    for cut in ("teacher", "fake"):
        assert relative(*gradients("uni", names=("kl",), cut=(cut,))["kl"]) > 0.02
    assert relative(*gradients("uni", names=("kl",), cut=("discriminate",))["kl"]) < 1e-7


def test_reverse_kl_is_sid_at_one_half():
    """The Fisher divergence in full: L_uni = 2 L_SiD, whatever the ratio."""
    x0, noise, level = inputs((0.1, 0.5, 2.0, 10.0), (1.0, 0.8, 0.6, 0.5))
    for weighting in ("none", "sid"):
        def ours(x):
            return jnp.sum(uni.pair_loss(nets(), x, noise, level, None, divergence="rkl", weighting=weighting)[0])

        def theirs(x):
            return jnp.sum(2 * sid.pair_loss(nets(), x, noise, level, None, alpha=0.5, weighting=weighting)[0])

        np.testing.assert_allclose(ours(x0), theirs(x0), rtol=1e-5)
        np.testing.assert_allclose(jax.grad(ours)(x0), jax.grad(theirs)(x0), rtol=1e-4, atol=1e-6)
