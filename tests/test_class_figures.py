"""Class balance and distances within classes, by hand and against draws."""

import numpy as np
import pytest

from sim_jax.evals import classes
from sim_jax.evals.frechet import Gaussian


def test_balance_by_hand():
    # 10 + 30 against 20 + 20: 1/2 (1/4 + 1/4); chi2 = 10^2/30 + 10^2/50, as the totals are equal. The third class nobody has.
    got = classes.balance(np.array([10, 30, 0]), np.array([20, 20, 0]))
    assert got == {"class_tv": pytest.approx(0.25), "class_chi2": pytest.approx(100 / 30 + 100 / 50), "class_chi2_dof": 1}


def test_equal_laws_give_chi_square_its_degrees_of_freedom():
    rng = np.random.default_rng(0)
    p = np.array([0.4, 0.3, 0.2, 0.1])
    values = [classes.balance(rng.multinomial(300, p), rng.multinomial(900, p)) for _ in range(3000)]
    assert np.mean([v["class_chi2"] for v in values]) == pytest.approx(3, rel=0.05)
    assert np.var([v["class_chi2"] for v in values]) == pytest.approx(6, rel=0.2)
    assert values[0]["class_chi2_dof"] == 3


def test_a_missing_class():
    assert classes.balance(np.array([5, 0]), np.array([5, 5]))["class_tv"] == 0.5


def test_distances_within_classes():
    unit = lambda mean, count=9: Gaussian(np.array([mean, 0.0]), np.eye(2), count)
    numbers, each = classes.class_distances({0: unit(1.0), 2: unit(5.0)}, {0: unit(0.0), 1: unit(0.0), 2: unit(2.0)})
    assert each == {0: pytest.approx(1.0), 2: pytest.approx(9.0)}
    assert numbers == {"class_fd": pytest.approx(5.0), "class_fd_max": pytest.approx(9.0), "class_fd_worst": 2, "class_fd_missing": 1}


def test_nothing_in_common_is_refused():
    with pytest.raises(ValueError, match="no class with 2 images"):
        classes.class_distances({}, {0: Gaussian(np.zeros(1), np.eye(1), 3)})
    with pytest.raises(ValueError, match="counts of 2 and 3 classes"):
        classes.balance(np.ones(2), np.ones(3))
