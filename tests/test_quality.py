"""The quality table: its limits on the real digits, its floor on a law that is known, its protocol."""

import json

import numpy as np
import pytest

from sim_jax.data import digits
from sim_jax.evals import frechet
from sim_jax.evals.features import FeatureExtractor, digits_features
from sim_jax.evals.quality import images_hash, quality, real_halves_fd


@pytest.fixture(scope="module")
def measure():
    real, features = digits.load(), digits_features()
    return lambda images, labels, **knobs: quality(images, labels, real_images=real.images,
                                                   real_labels=real.labels, features=features, **knobs)


@pytest.fixture(scope="module")
def real():
    return digits.load()


def _pixels(shape):
    """An extractor whose features are the pixels, and whose every class probability is the same."""
    return FeatureExtractor(identifier="pixels", image_shape=shape, extract=lambda images: (
        images.reshape(len(images), -1).astype(np.float32), np.ones((len(images), 4)) / 4))


def test_real_digits_measured_against_themselves(measure, real):
    table = measure(real.images, real.labels)
    assert table["fd"] < 1e-9
    assert table["precision"] == table["recall"] == table["coverage"] == 1.0
    assert table["class_agreement"] == table["real_class_agreement"] >= 0.99
    halves = real_halves_fd(real.images, real.labels, features=digits_features())
    assert table["noise_floor"] == pytest.approx(halves / 2)   # 1/M + 1/M instead of 2/M + 2/M


def test_order_does_not_matter_but_the_pairing_with_labels_does(measure, real):
    rng = np.random.default_rng(0)
    index = rng.integers(0, 1797, 600)
    straight = measure(real.images[index], real.labels[index])
    order = rng.permutation(600)
    turned = measure(real.images[index][order], real.labels[index][order])
    for name in ("fd", "class_agreement", "precision", "recall", "density", "coverage"):
        assert turned[name] == pytest.approx(straight[name], rel=1e-5)
    wrong = measure(real.images[index], (real.labels[index] + 1) % 10)
    assert wrong["class_agreement"] < 0.01 and wrong["fd"] == straight["fd"]


@pytest.mark.parametrize("damage", ["noise", "contrast", "blur", "missing class", "central"])
def test_each_kind_of_damage_is_seen(measure, real, damage):
    rng = np.random.default_rng(1)
    index = rng.integers(0, 1797, 1500)
    floor = measure(real.images[index], real.labels[index])["fd"]
    images = real.images.astype(np.float64)
    if damage == "noise":
        images = np.clip(images + 40 * rng.standard_normal(images.shape), 0, 255)
    elif damage == "contrast":
        images = 0.8 * images
    elif damage == "blur":
        images = 0.6 * images + 0.1 * sum(np.roll(images, s, a) for s in (1, -1) for a in (1, 2))
    elif damage == "missing class":
        index = index[real.labels[index] != 3]
    else:   # no style: the third of each class nearest to its mean
        far = np.zeros(1797)
        for label in range(10):
            of_class = real.labels == label
            far[of_class] = np.sum((images[of_class] - images[of_class].mean(0)[None]) ** 2, axis=(1, 2, 3))
            far[of_class] = far[of_class].argsort().argsort() / of_class.sum()
        index = index[far[index] < 1 / 3]
    table = measure(images[index].astype(np.uint8), real.labels[index])
    assert table["fd"] > 4 * floor
    if damage == "central":
        assert table["precision"] == 1.0 and table["recall"] < 0.8


def test_the_noise_floor_is_what_perfect_samples_show():
    # 12 independent uniform pixels: the law is known, so the floor can be checked by drawing from it.
    rng = np.random.default_rng(2)
    features = _pixels((2, 6, 1))
    real = rng.integers(0, 256, (800, 2, 6, 1)).astype(np.uint8)
    for count in (200, 800, 3200):
        tables = [quality(rng.integers(0, 256, (count, 2, 6, 1)).astype(np.uint8), None, real_images=real,
                          real_labels=None, features=features) for _ in range(8)]
        measured = np.mean([table["fd"] for table in tables])
        assert tables[0]["noise_floor"] == pytest.approx(measured, rel=0.35), count


def test_halves(real):
    features = digits_features()
    several = real_halves_fd(real.images, features=features, seed=0)
    assert several == real_halves_fd(real.images, features=features, seed=0)
    assert several != real_halves_fd(real.images, features=features, seed=1)
    order = np.random.default_rng(5).permutation(1797)
    a, b = (frechet.feature_statistics(features(real.images[order[start::2]])[0]) for start in (0, 1))
    one = real_halves_fd(real.images, features=features, seed=5, splits=1)
    assert one == pytest.approx(frechet.statistics_distance(a, b), rel=1e-4)
    with pytest.raises(ValueError, match="splits: got 0"):
        real_halves_fd(real.images, features=features, splits=0)


def test_halves_with_labels_hold_equally_many_of_each_class(real):
    # Constant images of two far classes, in even numbers: the halves are then the same set.
    images = np.repeat(np.array([0, 200], np.uint8), [30, 50])[:, None, None, None]
    labels = np.random.default_rng(0).permutation(80)
    images, labels = images[labels], (labels >= 30).astype(np.int32)
    features = _pixels((1, 1, 1))
    assert real_halves_fd(images, labels, features=features) == 0.0
    assert real_halves_fd(images, features=features) > 1.0
    digit_features = digits_features()
    assert (real_halves_fd(real.images, real.labels, features=digit_features)
            < 0.8 * real_halves_fd(real.images, features=digit_features))
    with pytest.raises(ValueError, match="real_labels: got"):
        real_halves_fd(images, labels[1:], features=features)


def test_the_table_carries_its_protocol_and_is_json(measure, real):
    table = json.loads(json.dumps(measure(real.images[:50], None)))
    assert table["count"] == 50 and table["reference_count"] == 1797
    assert table["class_agreement"] is None and table["label_scheme"] == "none"
    assert table["reference"] == images_hash(real.images, real.labels)
    assert table["features"] == digits_features().identifier
    assert measure(real.images[:50], real.labels[:50], label_scheme="balanced")["label_scheme"] == "balanced"


def test_the_hash_follows_pixels_labels_and_shape(real):
    images, labels = real.images[:4], real.labels[:4]
    changed = images.copy()
    changed[0, 0, 0, 0] += 1
    hashes = {images_hash(images), images_hash(images, labels), images_hash(images, labels[::-1]),
              images_hash(changed), images_hash(images.reshape(4, 8, 1, 8))}
    assert len(hashes) == 5
    assert images_hash(images, labels) == images_hash(images.copy(), labels.astype(np.int64))


@pytest.mark.parametrize("labels, message", [
    (np.zeros(49, np.int32), r"labels: got int32 \(49,\)"),
    (np.zeros(50, np.float32), "labels: got float32"),
    (np.full(50, 10), r"labels: got 10..10, allowed: 0..9"),
])
def test_labels_that_do_not_fit_are_refused(measure, real, labels, message):
    with pytest.raises(ValueError, match=message):
        measure(real.images[:50], labels)


def test_too_few_samples_are_refused(measure, real):
    with pytest.raises(ValueError, match="generated: got shape"):
        measure(real.images[:3], None)
