"""Forward processes against numerical integration, direct products and their own inverses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sim_jax.diffusion import preconditioners, schedules


def test_vp_is_the_integral_of_beta():
    beta_d, beta_min = 19.9, 0.1
    schedule = schedules.get("vp", beta_d=beta_d, beta_min=beta_min)
    for t in (1e-5, 1e-3, 0.1, 0.5, 1.0):
        s = np.linspace(0, t, 20001)
        beta = beta_min + beta_d * s
        integral = np.sum((beta[1:] + beta[:-1]) / 2 * np.diff(s))
        level = schedule.level(t)
        np.testing.assert_allclose(level.alpha, np.exp(-integral / 2), rtol=1e-9)
        np.testing.assert_allclose(level.alpha**2 + level.sigma**2, 1, rtol=1e-12)
        np.testing.assert_allclose(schedule.ve_sigma(t), np.sqrt(np.exp(integral) - 1), rtol=1e-6)


def test_vp_range_is_that_of_the_papers_networks():
    low, high = schedules.get("vp", epsilon_t=1e-3).sigma_range
    np.testing.assert_allclose(low, np.sqrt(np.expm1(0.5 * 19.9 * 1e-6 + 0.1e-3)), rtol=1e-12)
    np.testing.assert_allclose(high, np.sqrt(np.expm1(10.05)), rtol=1e-12)  # (19.9 + 0.2) / 2
    assert 152.1 < high < 152.2


def test_ve_forms():
    t = jnp.asarray([0.01, 4.0, 100.0])
    np.testing.assert_allclose(schedules.get("ve").level(t).sigma, [0.1, 2.0, 10.0], rtol=1e-6)
    np.testing.assert_array_equal(schedules.get("ve").level(t).alpha, 1.0)
    np.testing.assert_array_equal(schedules.get("edm").level(t).sigma, t)
    np.testing.assert_allclose(schedules.get("ve").sigma_range, (0.02, 100.0), rtol=1e-12)


@pytest.mark.parametrize("name", ["edm", "ve", "vp"])
def test_inverse_of_a_continuous_process(name):
    schedule = schedules.get(name)
    sigma = np.geomspace(1e-3, 100, 40)
    np.testing.assert_allclose(schedule.ve_sigma(schedule.t_of_sigma(sigma)), sigma, rtol=1e-10)
    on_device = schedule.ve_sigma(schedule.t_of_sigma(jnp.asarray(sigma, jnp.float32)))
    assert on_device.dtype == jnp.float32
    np.testing.assert_allclose(on_device, sigma, rtol=3e-6)
    assert schedule.round_sigma(sigma) is sigma


@pytest.mark.parametrize("name", ["edm", "ve", "vp", "ddpm", "iddpm"])
def test_device_agrees_with_host(name):
    schedule = schedules.get(name)
    t = np.arange(0, 1000, 37) if schedule.table is not None else np.linspace(1e-4, 1, 30)
    host, device = schedule.level(t), jax.jit(schedule.level)(jnp.asarray(t))
    for a, b in zip(host, device):
        assert a.dtype == np.float64 and b.dtype == jnp.float32
        np.testing.assert_allclose(b, a, rtol=2e-6)


def test_ddpm_is_the_product_of_alphas():
    betas = [1e-4 + (0.02 - 1e-4) * k / 999 for k in range(1000)]
    schedule, product = schedules.get("ddpm"), 1.0
    for k, beta in enumerate(betas):
        product *= 1 - beta
        if k in (0, 1, 499, 999):
            level = schedule.level(k)
            np.testing.assert_allclose(level.alpha**2, product, rtol=1e-10)
            np.testing.assert_allclose(level.sigma**2, 1 - product, rtol=1e-9)
    np.testing.assert_allclose(product, 4.0358e-5, rtol=1e-4)  # alpha_bar of the last of Ho et al.'s steps


def test_ddpm_without_end_point_is_the_recursion_of_sims_text_to_image_table():
    u = np.zeros(1001)
    for j in range(1000, 0, -1):
        beta = 0.02 + (1e-4 - 0.02) * j / 1000
        u[j - 1] = np.sqrt((u[j] ** 2 + 1) / (1 - beta) - 1)
    np.testing.assert_allclose(schedules.get("ddpm", endpoint=False).table[::-1], u[:-1], rtol=1e-9)


def test_iddpm_is_the_product_of_its_alphas_and_edms_table_reversed():
    M = 1000

    def f(r):
        return np.cos((r + 0.008) / 1.008 * np.pi / 2) ** 2

    betas = [min(1 - f((k + 1) / M) / f(k / M), 0.999) for k in range(M)]
    alpha_bar = np.cumprod(1 - np.asarray(betas))
    schedule = schedules.get("iddpm")
    np.testing.assert_allclose(schedule.level(np.arange(M)).alpha ** 2, alpha_bar, rtol=1e-9)
    # C_1 bites in the last step only
    np.testing.assert_allclose(alpha_bar[:-1], f(np.arange(1, M) / M) / f(0), rtol=1e-9)
    np.testing.assert_allclose(schedule.table[::-1], preconditioners.iddpm_table()[:-1], rtol=1e-8)


@pytest.mark.parametrize("name", ["ddpm", "iddpm"])
def test_discrete_index_is_the_nearest_level(name):
    schedule = schedules.get(name)
    index = np.arange(1000)
    assert np.all(np.diff(schedule.table) > 0)
    np.testing.assert_array_equal(schedule.t_of_sigma(schedule.table), index)
    np.testing.assert_array_equal(schedule.t_of_sigma(jnp.asarray(schedule.table, jnp.float32)), index)
    sigma = np.geomspace(1e-4, 1e4, 500)
    nearest = np.argmin(np.abs(sigma[:, None] - schedule.table[None, :]), axis=1)
    np.testing.assert_array_equal(schedule.t_of_sigma(sigma), nearest)
    np.testing.assert_allclose(schedule.round_sigma(sigma), schedule.table[nearest], rtol=1e-9)


@pytest.mark.parametrize(
    "name, knobs, words",
    [
        ("cosine", {}, ["schedule: got 'cosine'", "iddpm"]),
        ("vp", {"beta_max": 20.0}, ["schedule 'vp'", "'beta_max'", "beta_d, beta_min, epsilon_t"]),
        ("vp", {"epsilon_t": 2.0}, ["epsilon_t", "got 2.0"]),
        ("vp", {"beta_d": -1.0}, ["beta_min, beta_min + beta_d"]),
        ("edm", {"sigma_min": 3.0, "sigma_max": 2.0}, ["sigma_min, sigma_max: got 3.0, 2.0"]),
        ("ddpm", {"M": 0}, ["M: got 0"]),
        ("ddpm", {"beta_end": 1.5}, ["beta_start, beta_end"]),
        ("iddpm", {"C_1": 0.0}, ["C_1: got 0.0"]),
    ],
)
def test_bad_input_names_key_and_allowed(name, knobs, words):
    with pytest.raises(ValueError) as error:
        schedules.get(name, **knobs)
    for word in [*words, "allowed"]:
        assert word in str(error.value)
    assert "\n" not in str(error.value)
