"""Preconditioners against EDM's formulas (table 1 and equations 144-147 of arXiv 2206.00364) in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from sim_jax.diffusion import preconditioners

SIGMAS = np.array([0.002, 0.02, 0.1, 0.5, 1.0, 2.5, 10.0, 80.0])


def coefficients(precond, sigmas=SIGMAS):
    return [np.asarray(c) for c in precond.coefficients(jnp.asarray(sigmas, jnp.float32))]


def check(precond, c_skip, c_out, c_in, c_noise, atol=0.0):
    for got, expected in zip(coefficients(precond), (c_skip, c_out, c_in, c_noise), strict=True):
        assert got.dtype == np.float32 and got.shape == SIGMAS.shape
        np.testing.assert_allclose(got, expected * np.ones_like(SIGMAS), rtol=3e-6, atol=atol)


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_edm(sigma_data):
    s = SIGMAS
    check(preconditioners.make("EDMPrecond", sigma_data=sigma_data), sigma_data**2 / (s**2 + sigma_data**2),
          s * sigma_data / np.sqrt(s**2 + sigma_data**2), 1 / np.sqrt(s**2 + sigma_data**2), np.log(s) / 4, atol=1e-7)


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_edm_keeps_unit_variance(sigma_data):
    """For data of variance sigma_data^2: Var(c_in x) = 1, the effective target (y - c_skip x) / c_out has variance 1, and this
    c_skip makes c_out smallest: the target is uncorrelated with the input."""
    c_skip, c_out, c_in, _ = (c.astype(np.float64) for c in coefficients(preconditioners.edm(sigma_data=sigma_data)))
    data, noise = sigma_data**2, SIGMAS**2
    np.testing.assert_allclose(c_in**2 * (data + noise), 1, rtol=1e-6)
    np.testing.assert_allclose(((1 - c_skip) ** 2 * data + c_skip**2 * noise) / c_out**2, 1, rtol=1e-3)  # 1 - c_skip in float32
    np.testing.assert_allclose((1 - c_skip) * data, c_skip * noise, atol=2e-6)


def test_vp():
    """c_noise is (M - 1) t with sigma(t)^2 = exp(beta_d t^2 / 2 + beta_min t) - 1: inverse functions."""
    precond = preconditioners.vp(beta_d=19.9, beta_min=0.1, M=1000)
    t = (np.sqrt(0.1**2 + 2 * 19.9 * np.log(SIGMAS**2 + 1)) - 0.1) / 19.9
    np.testing.assert_allclose(np.sqrt(np.exp(19.9 * t**2 / 2 + 0.1 * t) - 1), SIGMAS, rtol=1e-9)
    check(precond, 1.0, -SIGMAS, 1 / np.sqrt(SIGMAS**2 + 1), 999 * t, atol=1e-3)
    np.testing.assert_allclose(coefficients(precond, [precond.sigma_min, precond.sigma_max])[3], [999 * 1e-5, 999], rtol=1e-2)
    assert precond.sigma_max == pytest.approx(np.sqrt(np.exp(19.9 / 2 + 0.1) - 1), rel=1e-9)


def test_ve():
    check(preconditioners.ve(), 1.0, SIGMAS, 1.0, np.log(SIGMAS / 2), atol=1e-6)
    assert (preconditioners.ve().sigma_min, preconditioners.ve().sigma_max) == (0.02, 100.0)


def test_iddpm():
    """c_noise counts down from M - 1 at u_0; a noise level between grid points goes to the nearer one."""
    precond = preconditioners.iddpm()
    u = preconditioners.iddpm_table()
    alpha_bar = lambda j: np.sin(np.pi / 2 * j / 1000 / 1.008) ** 2  # noqa: E731
    for j in (999, 500, 20):  # EDM: u_{j-1}^2 = (u_j^2 + 1) / max(abar_{j-1} / abar_j, C_1) - 1
        assert u[j - 1] ** 2 == pytest.approx((u[j] ** 2 + 1) / max(alpha_bar(j - 1) / alpha_bar(j), 1e-3) - 1, rel=1e-9)
    assert u[1000] == 0 and np.all(np.diff(u) < 0) and precond.out_factor == 2
    assert (precond.sigma_min, precond.sigma_max) == (np.float32(u[999]), np.float32(u[0]))

    j = np.array([1, 100, 500, 998])
    low, high = u[j + 1], u[j]
    for share, expected in ((0.0, j), (0.49, j), (0.51, j + 1)):
        sigma = high + share * (low - high)
        c_skip, c_out, c_in, c_noise = coefficients(precond, sigma)
        np.testing.assert_array_equal(c_noise, 999 - expected)
        np.testing.assert_allclose(precond.round_sigma(sigma), u[expected], rtol=1e-6)
        np.testing.assert_allclose(c_out, -sigma, rtol=1e-6)  # the level itself is not rounded here
        np.testing.assert_allclose(c_in, 1 / np.sqrt(sigma**2 + 1), rtol=1e-6)
        np.testing.assert_array_equal(c_skip, 1)
    once = precond.round_sigma(SIGMAS)
    np.testing.assert_array_equal(precond.round_sigma(once), once)


def test_others_do_not_round():
    for name in ("EDMPrecond", "VPPrecond", "VEPrecond"):
        assert preconditioners.make(name).round_sigma(0.1234) == 0.1234


def test_bad_names():
    with pytest.raises(ValueError, match=r"^precond: got 'EDM', allowed: EDMPrecond, VPPrecond, VEPrecond, iDDPMPrecond.*$"):
        preconditioners.make("EDM")
    with pytest.raises(ValueError, match=r"^VEPrecond: got unknown argument 'sigma_data', allowed: sigma_min, sigma_max$"):
        preconditioners.make("VEPrecond", sigma_data=0.5)
