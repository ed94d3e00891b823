"""Precision, recall, density and coverage on sets whose answer is known by construction or by counting."""

import numpy as np
import pytest

from sim_jax.evals import precision_recall as pr


def _by_counting(real, generated, k, density_k):
    """The definitions, point by point."""
    def radii(points, k):
        return [sorted(np.linalg.norm(points - p, axis=1))[k] for p in points]   # [0] is the point itself

    def distance(g, r):
        return np.linalg.norm(g - r)

    balls, wide, other = radii(real, k), radii(real, density_k), radii(generated, k)
    inside = [sum(distance(g, r) <= b for r, b in zip(real, wide)) for g in generated]
    return {
        "precision": np.mean([any(distance(g, r) <= b for r, b in zip(real, balls)) for g in generated]),
        "recall": np.mean([any(distance(g, r) <= b for g, b in zip(generated, other)) for r in real]),
        "density": np.mean(inside) / density_k,
        "coverage": np.mean([any(distance(g, r) <= b for g in generated) for r, b in zip(real, wide)]),
    }


@pytest.mark.parametrize("k, density_k", [(1, 1), (3, 5), (4, 2)])
def test_agrees_with_the_definitions(k, density_k):
    rng = np.random.default_rng(0)
    real, generated = rng.standard_normal((60, 3)), 0.8 * rng.standard_normal((45, 3)) + 0.4
    got = pr.precision_recall(real, generated, k=k, density_k=density_k)
    expected = _by_counting(real, generated, k, density_k)
    assert got == pytest.approx(expected, abs=1e-12)
    assert 0 < got["recall"] < 1 and 0 < got["precision"] < 1   # or the comparison says little


def test_by_hand_on_a_line():
    # Radii to one neighbour: 1, 1, 3 and 6 for the real points, .5, .5 and 27 for the generated ones.
    real, generated = np.array([[0.0], [1.0], [4.0], [10.0]]), np.array([[2.5], [3.0], [30.0]])
    got = pr.precision_recall(real, generated, k=1, density_k=1)
    # 2.5 and 3 lie in the ball of 4 alone, 30 in none; 4 and 10 lie in the ball of 30, 0 and 1 in none.
    assert got == pytest.approx({"precision": 2 / 3, "recall": 2 / 4, "density": 2 / 3, "coverage": 1 / 4})


def test_identical_sets():
    x = np.random.default_rng(1).standard_normal((400, 6))
    got = pr.precision_recall(x, x)
    assert got["precision"] == got["recall"] == got["coverage"] == 1.0
    assert got["density"] == pytest.approx(1.2)   # (k + 1) / k: each ball holds its centre too


def test_disjoint_sets():
    rng = np.random.default_rng(2)
    got = pr.precision_recall(rng.standard_normal((200, 4)), rng.standard_normal((300, 4)) + 1000.0)
    assert set(got.values()) == {0.0}


def test_one_of_two_modes_is_precise_but_recalls_half():
    rng = np.random.default_rng(3)
    modes = np.array([[-50.0, 0.0], [50.0, 0.0]])
    real = np.repeat(modes, 500, axis=0) + rng.standard_normal((1000, 2))
    generated = modes[:1] + rng.standard_normal((1000, 2))
    got = pr.precision_recall(real, generated)
    assert got["precision"] > 0.97 and 0.47 < got["recall"] <= 0.5 and 0.45 < got["coverage"] <= 0.5
    other = pr.precision_recall(generated, real)   # the roles exchanged
    assert 0.47 < other["precision"] <= 0.5 and other["recall"] > 0.97


def test_equal_laws_have_density_about_one():
    rng = np.random.default_rng(4)
    got = pr.precision_recall(rng.standard_normal((1500, 5)), rng.standard_normal((1500, 5)))
    assert got["density"] == pytest.approx(1.0, abs=0.1) and got["coverage"] > 0.9


def test_a_collapsed_generator_recalls_nothing():
    real = np.random.default_rng(5).standard_normal((200, 4))
    got = pr.precision_recall(real, np.repeat(real.mean(0)[None] + 1e-3, 200, axis=0))
    assert got["precision"] == 1.0 and got["recall"] == 0.0 and got["coverage"] < 0.5


@pytest.mark.parametrize("elements", [1, 64, 1000])
def test_block_size_and_shifts_change_nothing(monkeypatch, elements):
    rng = np.random.default_rng(6)
    real, generated = rng.standard_normal((70, 3)), rng.standard_normal((90, 3)) + 0.3
    whole = pr.precision_recall(real, generated)
    monkeypatch.setattr(pr, "_BLOCK_ELEMENTS", elements)
    assert pr.precision_recall(real, generated) == whole
    assert pr.precision_recall(real + 1e7, generated + 1e7) == whole


@pytest.mark.parametrize("real, generated, knobs, message", [
    (np.zeros((9, 2)), np.zeros((9, 2)), {"k": 0}, "k: got 0"),
    (np.zeros((9, 2)), np.zeros((9, 2)), {"density_k": 9}, "real: got shape"),
    (np.zeros((9, 2)), np.zeros((3, 2)), {}, "generated: got shape"),
    (np.zeros((9, 2)), np.zeros((9, 3)), {}, "generated: got 3 features"),
    (np.zeros((9, 2)), np.full((9, 2), np.nan), {}, "generated: got NaN"),
])
def test_bad_input(real, generated, knobs, message):
    with pytest.raises(ValueError, match=message):
        pr.precision_recall(real, generated, **knobs)
