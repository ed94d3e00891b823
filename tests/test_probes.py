"""Divergence and lag where both are known: one Gaussian per network, so that every denoiser is exact and linear.

With data N(m, v) per pixel, D(x; s) = E[x_0 | x_0 + s n = x] = (v x + s^2 m) / (v + s^2).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from sim_jax import probes, sharding
from sim_jax.state import DistillState, TrainState

SIGMAS, COUNT = np.array([0.3, 1.0, 3.0]), 2048
UNIT = (0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Exact:
    """The exact denoiser of N(mean, std^2) per pixel, `params` = (mean, std)."""

    label_dim: int = 0
    image_shape = (8, 8, 1)

    def bind(self, params, *, dropout_keys=None):
        mean, var = params[0], params[1] ** 2

        def denoise(x, sigma, cond):
            s = sigma[:, None, None, None]
            return (var * x + s**2 * mean) / (var + s**2)

        return denoise


@dataclasses.dataclass(frozen=True)
class Affine(Exact):
    """As a generator: z -> mean + std z from one call at sigma_init = 2.5."""

    def bind(self, params, *, dropout_keys=None):
        return lambda x, sigma, cond: params[0] + params[1] * x / sigma[:, None, None, None]


@functools.cache
def jitted(devices: int = 0):
    net = Exact()
    layout = sharding.Layout(sharding.make_mesh("data:-1", devices=jax.devices()[:devices])) if devices else sharding.Layout()
    made = tiny.recipe(tiny.PixelNet(), layout=layout)
    made = dataclasses.replace(
        made, teacher=net, fake_score=dataclasses.replace(made.fake_score, network=net), labels=lambda keys, index: index,
        generator=dataclasses.replace(made.generator, network=Affine()))
    return jax.jit(probes.make_probe(made, SIGMAS, count=COUNT))


def probe(generator, fake, teacher, *, devices=0, key=0):
    network = lambda params: TrainState(step=jnp.int32(0), params=tuple(map(jnp.float32, params)))  # noqa: E731
    state = DistillState(step=jnp.int32(0), generator=network(generator), fake_score=network(fake))
    out = jitted(devices)(state, tuple(map(jnp.float32, teacher)), jax.random.key(key))
    return {name: float(value) for name, value in out.items()}


def test_equal_scores_have_no_divergence():
    """Fake score = teacher: zero at every level, whatever the generator does; the lag stays finite."""
    out = probe((0.7, 0.2), UNIT, UNIT)
    assert max(out[f"divergence/sigma{s:.3g}"] for s in SIGMAS) < 1e-12
    assert np.isfinite(out["fake_score/lag"])


def test_divergence_of_gaussians():
    """f - r = s^2 (m_f - m_r) / (1 + s^2) for equal variances: its square over s^2, exactly."""
    out = probe((0.4, 1.0), (0.4, 1.0), UNIT)
    for s in SIGMAS:
        assert out[f"divergence/sigma{s:.3g}"] == pytest.approx((s**2 * 0.4 / (1 + s**2)) ** 2 / s**2, rel=1e-4)


def test_divergence_of_other_widths():
    """f - r = (v_f / (v_f + s^2) - 1 / (1 + s^2)) x_t with x_t ~ N(0, v_g + s^2)."""
    out = probe((0.0, 0.5), (0.0, 0.5), UNIT)
    for s in SIGMAS:
        expected = (0.25 / (0.25 + s**2) - 1 / (1 + s**2)) ** 2 * (0.25 + s**2) / s**2
        assert out[f"divergence/sigma{s:.3g}"] == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("generator", [(0.4, 1.0), (0.0, 0.5), (-0.3, 1.4)])
def test_exact_fake_score_has_no_lag(generator):
    assert abs(probe(generator, generator, UNIT)["fake_score/lag"]) < 0.03


@pytest.mark.parametrize("fake", [(0.4, 1.0), (0.0, 0.5), (-0.3, 1.4)])
def test_wrong_fake_score_of_a_perfect_generator_is_all_lag(fake):
    """The generator has the teacher's distribution: every difference between the scores is the fake score's error."""
    assert probe(UNIT, fake, UNIT)["fake_score/lag"] == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("generator, fake, expected", [(0.8, 0.4, -1.0), (0.4, 0.8, 0.5), (0.2, 0.8, 0.75), (-0.8, 0.8, 2.0)])
def test_lag_between(generator, fake, expected):
    """Equal variances, teacher's mean 0: lag = (m_f - m_g) / m_f; a fake score half way behind its generator has -1."""
    assert probe((generator, 1.0), (fake, 1.0), UNIT)["fake_score/lag"] == pytest.approx(expected, abs=0.06)


def test_held_out_noise_is_fixed():
    """The same key measures on the same noise; another key, or more devices, change nothing but sampling error and rounding."""
    first, again, other = (probe((0.0, 0.5), (0.1, 0.9), UNIT, key=k) for k in (0, 0, 1))
    assert first == again != other
    for name, value in probe((0.0, 0.5), (0.1, 0.9), UNIT, devices=4).items():
        assert value == pytest.approx(first[name], rel=1e-4), name
        assert other[name] == pytest.approx(value, rel=0.1), name


def test_levels_are_middles_of_equal_parts():
    """Karras: sigma = (a + t (b - a))^7 at t = u_max (i + 1/2) / n."""
    got = probes.probe_levels("karras", 4, u_max=0.8, sigma_min=0.002, sigma_max=80.0)
    a, b = 0.002 ** (1 / 7), 80 ** (1 / 7)
    np.testing.assert_allclose(got, (a + 0.8 * (np.arange(4) + 0.5) / 4 * (b - a)) ** 7, rtol=1e-9)
