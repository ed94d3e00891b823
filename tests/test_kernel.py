"""The kernel distance against its value in closed form, and against the definition."""

import numpy as np
import pytest

from sim_jax.evals import kernel


def _by_definition(x, y):
    k = lambda a, b: (a @ b / len(a) + 1) ** 3
    within = lambda p: np.mean([k(a, b) for i, a in enumerate(p) for j, b in enumerate(p) if i != j])
    return within(x) + within(y) - 2 * np.mean([k(a, b) for a in x for b in y])


def test_agrees_with_the_definition_for_unequal_numbers():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((7, 5)), rng.standard_normal((11, 5)) + 0.3
    assert kernel.mmd2(x, y) == pytest.approx(_by_definition(x, y), rel=1e-12)


@pytest.mark.parametrize("delta", [0.0, 0.5])
@pytest.mark.parametrize("sizes", [(4, 4), (12, 5)])
def test_its_mean_is_the_closed_form_for_any_number_of_images(delta, sizes):
    # In one dimension the cubic kernel compares three moments: MMD^2 = sum_k binom(3, k) (E x^k - E y^k)^2.
    expected = 3 * delta**2 + 3 * (delta**2) ** 2 + (delta**3 + 3 * delta) ** 2
    rng = np.random.default_rng(1)
    draws = np.array([kernel.mmd2(rng.standard_normal((sizes[0], 1)), rng.standard_normal((sizes[1], 1)) + delta) for _ in range(20000)])
    error = draws.std() / np.sqrt(len(draws))
    assert abs(draws.mean() - expected) < 4 * error
    # The estimate with its diagonal would be larger by E k(x, x) - E k(x, x') over n, and so be caught: it exceeds the tolerance.
    assert (1 + 3 + 9 + 15 - 1) * (1 / sizes[0] + 1 / sizes[1]) > 8 * error


def test_subsets_follow_their_seed_and_shrink_to_what_there_is():
    rng = np.random.default_rng(2)
    real, fake = rng.standard_normal((90, 4)), rng.standard_normal((60, 4)) + 1
    one, again, other = (kernel.kernel_distance(real, fake, subsets=5, subset_size=40, seed=s) for s in (0, 0, 1))
    assert one == again and one["kd"] != other["kd"] and one["kd_subset_size"] == 40
    whole = kernel.kernel_distance(real, fake[:50], subsets=3)
    assert whole["kd_subset_size"] == 50
    # All of the samples are in every subset; only the reference's part is drawn.
    assert kernel.kernel_distance(fake, fake, subsets=2)["kd_std"] == pytest.approx(0, abs=1e-9)


def test_the_mean_over_subsets_estimates_the_same():
    rng = np.random.default_rng(3)
    real, fake = rng.standard_normal((3000, 1)), rng.standard_normal((3000, 1)) + 0.5
    got = kernel.kernel_distance(real, fake, subset_size=500)
    assert got["kd"] == pytest.approx(kernel.mmd2(fake, real), abs=3 * got["kd_std"] / 10)
    assert got["kd"] == pytest.approx(3 * 0.25 + 3 * 0.0625 + 1.625**2, rel=0.15)


def test_blocks_change_nothing(monkeypatch):
    rng = np.random.default_rng(4)
    x, y = rng.standard_normal((50, 3)), rng.standard_normal((31, 3))
    whole = kernel.mmd2(x, y)
    monkeypatch.setattr(kernel, "_BLOCK", 7)
    assert kernel.mmd2(x, y) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("real, fake, knobs, message", [
    (np.zeros((1, 2)), np.zeros((5, 2)), {}, "real: got shape"),
    (np.zeros((5, 2)), np.zeros((5, 3)), {}, "generated: got shape"),
    (np.zeros((5, 2)), np.full((5, 2), np.nan), {}, "generated: got NaN"),
    (np.zeros((5, 2)), np.zeros((5, 2)), {"subsets": 0}, "subsets: got 0"),
])
def test_what_cannot_be_measured_is_refused(real, fake, knobs, message):
    with pytest.raises(ValueError, match=message):
        kernel.kernel_distance(real, fake, **knobs)
