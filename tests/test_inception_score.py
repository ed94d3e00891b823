"""The Inception score on probabilities whose score is known."""

import numpy as np
import pytest

from sim_jax.evals.inception_score import InceptionScore


def _score(probabilities, *, chunks=1, **knobs):
    score = InceptionScore(len(probabilities), **knobs)
    for chunk in np.array_split(probabilities, chunks):
        score.add(chunk)
    return score.result()


def test_sure_of_every_class_scores_their_number():
    one_hot = np.eye(7)[np.arange(700) % 7]
    assert _score(one_hot, splits=1) == pytest.approx({"is": 7.0, "is_std": 0.0})


def test_knowing_nothing_or_one_class_scores_one():
    for probabilities in (np.full((50, 5), 0.2), np.eye(5)[np.zeros(50, int)]):
        assert _score(probabilities) == pytest.approx({"is": 1.0, "is_std": 0.0}, abs=1e-12)


def test_agrees_with_the_definition_and_with_itself_in_chunks():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(6, 0.3), 95)
    members = rng = np.random.default_rng(5).permutation(95) * 10 // 95
    scores = []
    for split in range(10):
        part = p[members == split]
        q = part.mean(0)
        scores.append(np.exp(np.mean([np.sum(row * np.log(row / q)) for row in part])))
    for chunks in (1, 4, 95):
        got = _score(p, chunks=chunks, seed=5)
        assert got == pytest.approx({"is": np.mean(scores), "is_std": np.std(scores)}, rel=1e-9)


def test_a_file_sorted_by_class_does_not_lower_it():
    one_hot = np.eye(10)[np.arange(5000) // 500]
    assert _score(one_hot)["is"] > 9.5          # splits in order would score 1


def test_splits_are_as_equal_as_can_be():
    score = InceptionScore(1003)
    assert score._sizes.sum() == 1003 and score._sizes.max() - score._sizes.min() == 1


@pytest.mark.parametrize("count, splits", [(5, 10), (5, 0)])
def test_too_few_images_are_refused(count, splits):
    with pytest.raises(ValueError, match=f"splits: got {splits} of 5 images"):
        InceptionScore(count, splits=splits)
