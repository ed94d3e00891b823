"""Label streams without data."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sim_jax.data import labels

COUNT = 20_000


@pytest.fixture(scope="module")
def keys():
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(jnp.arange(COUNT))


@pytest.mark.parametrize("scheme,histogram,expected", [
    ("uniform", None, [0.25, 0.25, 0.25, 0.25]),
    ("balanced", None, [0.25, 0.25, 0.25, 0.25]),
    ("histogram", [1, 0, 3, 4], [0.125, 0, 0.375, 0.5])])
def test_frequencies(keys, scheme, histogram, expected):
    drawn = labels.make(scheme, 4, histogram=histogram)(keys, jnp.arange(COUNT))
    assert drawn.dtype == jnp.int32 and drawn.shape == (COUNT,)
    frequencies = np.bincount(drawn, minlength=4) / COUNT
    tolerance = 0 if scheme == "balanced" else 5 * 0.5 / np.sqrt(COUNT)
    np.testing.assert_allclose(frequencies, expected, atol=tolerance)
    if histogram:
        assert frequencies[1] == 0


def test_balanced_is_the_index_modulo_the_classes(keys):
    index = jnp.array([7, 8, 9, 100])
    np.testing.assert_array_equal(labels.make("balanced", 10)(keys[:4], index), [7, 8, 9, 0])


@pytest.mark.parametrize("scheme", ["uniform", "balanced", "histogram"])
def test_a_part_of_the_batch_gets_its_part_of_the_labels(keys, scheme):
    sample = jax.jit(labels.make(scheme, 5, histogram=[1, 2, 3, 4, 5] if scheme == "histogram" else None))
    whole = sample(keys[:64], jnp.arange(64))
    np.testing.assert_array_equal(sample(keys[16:32], jnp.arange(16, 32)), whole[16:32])


@pytest.mark.parametrize("scheme", ["none", "uniform", "balanced"])
def test_unconditional_gives_zeros_and_no_one_hot(keys, scheme):
    drawn = labels.make(scheme, 0)(keys[:3], jnp.arange(3))
    np.testing.assert_array_equal(drawn, [0, 0, 0])
    assert labels.one_hot(drawn, 0) is None


def test_one_hot():
    encoded = labels.one_hot(jnp.array([2, 0]), 3)
    np.testing.assert_array_equal(encoded, [[0, 0, 1], [1, 0, 0]])
    assert encoded.dtype == jnp.float32


@pytest.mark.parametrize("scheme,label_dim,histogram,match", [
    ("random", 4, None, "labels: got 'random', allowed: uniform, balanced, histogram, none"),
    ("none", 4, None, "labels: got none for 4 classes"),
    ("uniform", -1, None, "label_dim: got -1"),
    ("uniform", 4, [1, 1, 1, 1], "histogram: got class weights"),
    ("histogram", 4, None, "histogram"),
    ("histogram", 4, [1, 2, 3], "histogram: got shape"),
    ("histogram", 2, [1, -1], "weights >= 0"),
    ("histogram", 2, [0, 0], "positive sum"),
    ("histogram", 2, [1, float("nan")], "histogram"),
    ("histogram", 2, [1, float("inf")], "histogram"),
    ("histogram", 2, ["a", "b"], "histogram")])
def test_bad_schemes_are_refused(scheme, label_dim, histogram, match):
    with pytest.raises(ValueError, match=match):
        labels.make(scheme, label_dim, histogram=histogram)


@pytest.mark.parametrize("text,expected", [("3", [3]), ("0,3", [0, 3]), ("0-4", [0, 1, 2, 3, 4]),
                                           ("9, 1-2 ,1", [9, 1, 2, 1]), ("5-5", [5])])
def test_class_lists(text, expected):
    classes = labels.parse_classes(text, 10)
    assert classes.dtype == np.int32 and classes.tolist() == expected


@pytest.mark.parametrize("text", ["", "a", "1,", "1.5", "-1", "1-", "-", "1--2", "4-0", "10", "0-10",
                                  "0-999999999999", "99999999999999999999", "\u00b2"])
def test_bad_class_lists_are_refused(text):
    with pytest.raises(ValueError, match="classes: got.*allowed"):
        labels.parse_classes(text, 10)


def test_classes_of_an_unconditional_network_are_refused():
    with pytest.raises(ValueError, match="unconditional"):
        labels.parse_classes("0", 0)


@pytest.mark.parametrize("values", [[0, 10], [-1], [0.5], [[1]]])
def test_labels_from_outside_are_checked(values):
    with pytest.raises(ValueError, match="classes: got"):
        labels.check_labels(values, 10)
    assert labels.check_labels([], 10).tolist() == []
