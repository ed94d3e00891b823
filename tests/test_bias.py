"""The bias of finite numbers of images: closed form against draws, extrapolation against the law's own distance."""

import numpy as np
import pytest

from sim_jax.evals import bias, frechet


def test_one_dimension_by_hand():
    # Variance of a mean is s^2/n, of a standard deviation s^2/2n.
    assert bias.expected_bias(np.array([4.0]), 100) == pytest.approx(4.0 * 1.5 / 100)
    assert bias.expected_bias(np.array([4.0]), 100, 300) == pytest.approx(4.0 * 1.5 * (1 / 100 + 1 / 300))


def test_it_is_what_draws_from_one_law_show():
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    root = rotation * np.sqrt([3.0, 1.0, 1.0, 0.3, 0.1, 0.0])[None]
    draw = lambda n: frechet.feature_statistics(rng.standard_normal((n, 6)) @ root.T)
    measured = np.mean([frechet.statistics_distance(draw(400), draw(800)) for _ in range(400)])
    assert bias.expected_bias(np.array([3.0, 1.0, 1.0, 0.3, 0.1, 0.0]), 400, 800) == pytest.approx(measured, rel=0.08)


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_extrapolation_finds_the_distance_of_the_laws(shift):
    rng = np.random.default_rng(1)
    features = rng.standard_normal((3000, 30)) + shift / np.sqrt(30)
    law = frechet.Gaussian(np.zeros(30), np.eye(30))
    plain = frechet.distance(frechet.gaussian(frechet.feature_statistics(features)), law)
    got = bias.extrapolate(features, law)
    assert plain - shift**2 > 0.8 * bias.expected_bias(law.eigenvalues, 3000)    # there is something to remove: 0.16
    assert abs(got["fd_inf"] - shift**2) < 0.2 * (plain - shift**2) + 2 * got["fd_inf_error"]
    assert got == bias.extrapolate(features, law)                                # a function of its seed


def test_too_few_samples_are_refused():
    with pytest.raises(ValueError, match="fd_inf: got 15 subsets of 19 images"):
        bias.extrapolate(np.zeros((19, 2)), frechet.Gaussian(np.zeros(2), np.eye(2)))
