"""Noise-level samplers against closed-form distributions, published ranges and the reference's grid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from sim_jax.diffusion import noise_levels

KNOBS = {
    "log_normal": {"P_mean": -0.5, "P_std": 1.5},
    "karras": {"u_min": 0.1, "u_max": 0.9},
    "uniform": {"sigma_min": 0.02, "sigma_max": 100.0, "space": "log_sigma"},
    "grid": {"M": 200, "i_min": 3, "i_max": 151},
    "ddpm": {"M": 300, "i_min": 20, "i_max": 280},
}


def keys_of(n, seed=0):
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(n))


def karras_cdf(sigma, u_min, u_max):
    root = np.asarray(sigma) ** (1 / 7)
    t = (root - 0.002 ** (1 / 7)) / (80.0 ** (1 / 7) - 0.002 ** (1 / 7))
    return (t - u_min) / (u_max - u_min)


CDFS = {
    "log_normal": scipy.stats.lognorm(s=1.5, scale=np.exp(-0.5)).cdf,
    "karras": lambda s: karras_cdf(s, 0.1, 0.9),
    "uniform": scipy.stats.loguniform(0.02, 100.0).cdf,
}


@pytest.mark.parametrize("name", CDFS)
def test_samples_follow_the_closed_form_distribution(name):
    level = noise_levels.make(name, **KNOBS[name])(keys_of(4000))
    assert scipy.stats.kstest(np.asarray(level.sigma), CDFS[name]).pvalue > 1e-2


def test_uniform_in_sigma():
    level = noise_levels.make("uniform", sigma_min=1.0, sigma_max=3.0, space="sigma")(keys_of(4000))
    assert scipy.stats.kstest(np.asarray(level.sigma), scipy.stats.uniform(1, 2).cdf).pvalue > 1e-2


def test_grid_is_uniform_over_its_indices():
    sigma = np.asarray(noise_levels.make("grid", M=10, i_min=2, i_max=8)(keys_of(6000)).sigma)
    grid = noise_levels.karras_grid(10).astype(np.float32)
    index = np.argmin(np.abs(sigma[:, None] - grid[None, :]), axis=1)
    np.testing.assert_allclose(grid[index], sigma, rtol=1e-6)
    counts = np.bincount(index, minlength=10)
    assert counts[[0, 1, 8, 9]].sum() == 0
    assert scipy.stats.chisquare(counts[2:8]).pvalue > 1e-2


@pytest.mark.parametrize("name", CDFS)
def test_quantile_inverts_the_closed_form_distribution(name):
    u = np.linspace(0.01, 0.99, 99)
    np.testing.assert_allclose(CDFS[name](noise_levels.quantile(name, u, **KNOBS[name])), u, rtol=1e-9)
    on_device = noise_levels.quantile(name, jnp.asarray(u, jnp.float32), **KNOBS[name])
    np.testing.assert_allclose(CDFS[name](np.asarray(on_device, np.float64)), u, rtol=1e-4)


def test_truncated_karras_is_sids():
    # SiD: t in [0, 0.8] of the ramp from 0.002 to 80 reaches 24.4
    assert noise_levels.karras_quantile(0.0) == pytest.approx(0.002, rel=1e-12)
    by_hand = (0.002 ** (1 / 7) + 0.8 * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
    assert noise_levels.karras_quantile(1.0) == pytest.approx(by_hand, rel=1e-12)
    assert by_hand == pytest.approx(24.4, abs=0.05)
    sigma = np.asarray(noise_levels.make("karras")(keys_of(4000)).sigma)
    assert 0.002 * (1 - 1e-5) <= sigma.min() < 0.003 and 24.0 < sigma.max() <= by_hand * (1 + 1e-5)


def test_karras_grid_is_edms_and_small_first():
    grid = noise_levels.karras_grid(18)
    assert grid.dtype == np.float64 and np.all(np.diff(grid) > 0)
    root = [80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7)) for i in range(18)]
    np.testing.assert_allclose(grid[::-1], np.asarray(root) ** 7, rtol=1e-10)
    np.testing.assert_allclose(grid[[0, -1]], [0.002, 80.0], rtol=1e-12)
    np.testing.assert_allclose(noise_levels.karras_grid(1), [80.0], rtol=1e-12)
    # DMD2's range of indices, 20 to 980 of 1000
    levels = noise_levels.quantile("grid", np.asarray([0.0, 1.0]))
    np.testing.assert_allclose(levels, [3.2e-3, 72.0], rtol=0.02)


def test_golden_grid_and_draws(shared_dir):
    with np.load(shared_dir / "goldens" / "objectives.npz") as golden:
        np.testing.assert_allclose(noise_levels.karras_grid(1000), golden["dmd2/karras_sigmas"], rtol=3e-6)
        normal = golden["normal"]
    sigma = noise_levels.log_normal_from_normal(jnp.asarray(normal))
    np.testing.assert_allclose(sigma, np.exp(normal.astype(np.float64) * 1.2 - 1.2), rtol=1e-6)


@pytest.mark.parametrize("name", KNOBS)
def test_a_level_depends_on_its_own_key_only(name):
    sample = noise_levels.make(name, **KNOBS[name])
    keys = keys_of(12)
    whole = jax.jit(sample)(keys)
    parts = jnp.concatenate([jax.jit(sample)(part).sigma for part in (keys[:5], keys[5:])])
    np.testing.assert_array_equal(whole.sigma, parts)
    assert len(np.unique(whole.sigma)) > 6
    np.testing.assert_array_equal(whole.alpha, 1.0)
    np.testing.assert_array_equal(whole.t, whole.sigma)
    assert all(entry.dtype == jnp.float32 and entry.shape == (12,) for entry in whole)


@pytest.mark.parametrize("name", KNOBS)
def test_bins_are_equally_likely(name):
    edges = noise_levels.bin_edges(name, 4, **KNOBS[name])
    assert edges.shape == (5,) and np.all(np.diff(edges) > 0)
    sigma = np.asarray(noise_levels.make(name, **KNOBS[name])(keys_of(4000)).sigma, np.float64) * (1 + 1e-5)
    counts = np.bincount(np.digitize(sigma, edges[1:-1]), minlength=4)
    assert scipy.stats.chisquare(counts).pvalue > 1e-2


def test_log_normal_outer_edges():
    edges = noise_levels.bin_edges("log_normal", 2)
    np.testing.assert_allclose(edges, [0, np.exp(-1.2), np.inf], rtol=1e-12)


@pytest.mark.parametrize(
    "name, knobs, words",
    [
        ("lognormal", {}, ["noise_level: got 'lognormal'", "log_normal, karras, uniform, grid, ddpm"]),
        ("karras", {"tmax": 0.8}, ["noise_level 'karras'", "'tmax'", "u_min, u_max, sigma_min"]),
        ("karras", {"u_max": 1.5}, ["u_min, u_max: got 0.0, 1.5"]),
        ("karras", {"sigma_min": 0.0}, ["sigma_min, sigma_max: got 0.0"]),
        ("karras", {"rho": 0.0}, ["rho: got 0.0"]),
        ("log_normal", {"P_std": 0.0}, ["P_std: got 0.0"]),
        ("uniform", {"space": "log"}, ["space: got 'log'", "sigma, log_sigma"]),
        ("ddpm", {"i_min": 7, "i_max": 7}, ["i_min, i_max: got 7, 7", "M = 1000"]),
        ("grid", {"i_max": 1001}, ["i_min, i_max: got 20, 1001", "M = 1000"]),
    ],
)
def test_bad_input_names_key_and_allowed(name, knobs, words):
    with pytest.raises(ValueError) as error:
        noise_levels.make(name, **knobs)
    for word in [*words, "allowed"]:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_counts_from_one():
    with pytest.raises(ValueError, match="n: got 0, allowed"):
        noise_levels.karras_grid(0)
    with pytest.raises(ValueError, match="num_bins: got 0, allowed"):
        noise_levels.bin_edges("karras", 0)
