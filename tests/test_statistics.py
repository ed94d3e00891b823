"""One pass over a set of images: what is kept, against numpy; and that chunks, batches and devices change nothing but rounding."""

import dataclasses
import tracemalloc

import numpy as np
import pytest

import measuring
from sim_jax.evals import statistics, streams
from sim_jax.evals.quality import images_hash


def _stream(pixels, labels=None, *, chunk=7):
    read = lambda size: (pixels[start:start + chunk] for start in range(0, len(pixels), chunk))
    return streams.ImageStream(count=len(pixels), image_shape=pixels.shape[1:], read=read, labels=labels, origin="test")


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (2500, 4, 4, 1), np.uint8)


@pytest.mark.parametrize("chunk", [1, 64, 2500])
def test_everything_against_numpy(pixels, chunk):
    if chunk == 1:
        pixels = pixels[:100]
    extractor = measuring.pixel_features()
    features, probabilities, spatial = extractor.extract(pixels)
    labels = (np.arange(len(pixels)) % 3).astype(np.int32)
    got = statistics.collect(_stream(pixels, labels, chunk=chunk), extractor, statistics.NEEDS, max_rows=40)
    for gaussian, x in ((got.features, features), (got.spatial, spatial), (got.classes[1], features[1::3])):
        np.testing.assert_allclose(gaussian.mean, x.mean(0, dtype=np.float64), rtol=1e-12)
        np.testing.assert_allclose(gaussian.covariance, np.cov(x.T.astype(np.float64)), rtol=1e-9, atol=1e-12)
        assert gaussian.count == len(x)
    assert got.count == len(pixels) and got.hash == images_hash(pixels, labels) and got.extractor == "pixels:0"
    np.testing.assert_array_equal(got.predicted, probabilities.sum(0))
    assert got.agreement == np.mean(probabilities.argmax(1) == labels)
    assert len(got.rows.index) == 40 and (np.diff(got.rows.index) > 0).all()
    np.testing.assert_array_equal(got.rows.features, features[got.rows.index])
    np.testing.assert_array_equal(got.rows.pixels, pixels[got.rows.index])
    np.testing.assert_array_equal(got.rows.labels, labels[got.rows.index])
    np.testing.assert_array_equal(got.label_counts, np.bincount(labels))


def test_only_what_is_needed_is_kept(pixels):
    got = statistics.collect(_stream(pixels), measuring.pixel_features(), ("features",))
    empty = ("spatial", "classes", "predicted", "agreement", "rows", "score", "label_counts")
    assert all(getattr(got, name) is None for name in empty) and got.features is not None
    assert statistics.collect(_stream(pixels), measuring.pixel_features(), ("rows",)).rows.pixels is None


def test_rows_do_not_depend_on_chunks_but_on_the_seed(pixels):
    kept = [statistics.collect(_stream(pixels, chunk=chunk), measuring.pixel_features(), ("rows",), max_rows=100, seed=seed).rows
            for chunk, seed in ((7, 0), (999, 0), (7, 1))]
    np.testing.assert_array_equal(kept[0].features, kept[1].features)
    assert (kept[0].index != kept[2].index).any()


def test_a_set_without_labels_is_split_by_predicted_class(pixels):
    got = statistics.collect(_stream(pixels), measuring.pixel_features(), ("classes",))
    x = measuring.pixel_features().extract(pixels)[0]
    np.testing.assert_allclose(got.classes[2].mean, x[pixels[:, 0, 0, 0] // 64 == 2].mean(0, dtype=np.float64), rtol=1e-12)


def test_agreement_is_for_classifiers_that_know_the_labels(pixels):
    extractor = dataclasses.replace(measuring.pixel_features(), labelled=False)
    got = statistics.collect(_stream(pixels, np.zeros(2500, np.int32)), extractor, ("predicted",))
    assert got.agreement is None and got.predicted.sum() == 2500


def _cifar(shared_dir, count):
    path = shared_dir / "data" / "cifar10-32x32.zip"
    if not path.is_file():
        pytest.skip(f"no {path.name} in the shared data")
    stream = streams.open_stream(str(path))
    return dataclasses.replace(stream, count=count, labels=stream.labels[:count], read=lambda size: _first(stream, count, size))


def _first(stream, count, size):
    for part in stream.read(size):
        yield part[:count]
        count -= len(part)
        if count <= 0:
            return


@pytest.mark.parametrize("count", [2000, pytest.param(50_000, marks=pytest.mark.slow)])
def test_cifar_statistics_agree_between_batch_sizes_and_numbers_of_devices(shared_dir, count):
    stream = _cifar(shared_dir, count)
    makers = [dict(batch=64), dict(batch=50), dict(batch=64, devices=1), dict(batch=16, devices=4), dict(batch=37, devices=4)]
    first, *others = [statistics.collect(stream, measuring.random_network(**knobs), ("features", "spatial")) for knobs in makers]
    for other in others:
        assert other.hash == first.hash
        for a, b in ((first.features, other.features), (first.spatial, other.spatial)):
            assert np.abs(a.mean - b.mean).max() <= 1e-6 * np.abs(a.mean).max()
            assert np.abs(a.covariance - b.covariance).max() <= 1e-6 * np.abs(a.covariance).max()


def test_memory_does_not_grow_with_the_number_of_images():
    part = np.random.default_rng(0).integers(0, 256, (250, 8, 8, 1), np.uint8)

    def peak(count):
        stream = streams.ImageStream(count=count, image_shape=part.shape[1:], read=lambda size: (part for _ in range(count // 250)))
        tracemalloc.start()
        try:
            statistics.collect(stream, measuring.pixel_features(part.shape[1:]), ("features", "score", "predicted", "rows"), max_rows=250)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(250)
    # 25 bytes an image say which split it is in, and which are kept; the images and features of one take 1344.
    assert peak(20_000) < peak(2_000) + 25 * 18_000


@pytest.mark.parametrize("needs, change, message", [
    (("spatial",), {"outputs": ("features", "probabilities")}, "which has no spatial"),
    (("score",), {"outputs": ("features",)}, "which has no probabilities"),
    (("features",), {"image_shape": (8, 8, 1)}, r"images: got uint8 4x4x1, allowed: uint8 \[N,8,8,1\]"),
])
def test_what_the_features_cannot_give_is_refused_before_anything_is_read(pixels, needs, change, message):
    extractor = dataclasses.replace(measuring.pixel_features(), extract=None, **change)
    with pytest.raises(ValueError, match=message):
        statistics.collect(dataclasses.replace(_stream(pixels), read=None), extractor, needs)


def test_one_image_and_broken_features_are_refused(pixels):
    with pytest.raises(ValueError, match="images: got 1 in test, allowed: 2 or more"):
        statistics.collect(_stream(pixels[:1]), measuring.pixel_features(), ("features",))
    broken = dataclasses.replace(measuring.pixel_features(), outputs=("features",), extract=lambda x: (np.full((len(x), 2), np.nan),))
    with pytest.raises(ValueError, match="rows with NaN"):
        statistics.collect(_stream(pixels), broken, ("features",))


def test_too_many_classes_for_too_many_features(pixels, monkeypatch):
    monkeypatch.setattr(statistics, "_CLASS_BYTES", 3 * 16**2 * 8)
    labels = (np.arange(2500) % 5).astype(np.int32)
    with pytest.raises(ValueError, match="class_fd for 4 classes or more with 16 features"):
        statistics.collect(_stream(pixels, labels), measuring.pixel_features(), ("classes",))
