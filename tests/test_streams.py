"""Images from files of every kind, chunk by chunk: the same images, the same hash; broken files in one line."""

import numpy as np
import pytest

from sim_jax import images
from sim_jax.data import digits
from sim_jax.data.images import open_images
from sim_jax.evals import streams
from sim_jax.evals.quality import images_hash


def _all(stream, size=10):
    return np.concatenate(list(stream.read(size)))


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (23, 6, 6, 3), np.uint8)


@pytest.fixture
def files(tmp_path, pixels):
    """The same images and labels as .zip, folder, our .npz and ADM's, compressed and not."""
    labels = (np.arange(23) % 4).astype(np.int32)
    out = {"zip": tmp_path / "a.zip", "npz": tmp_path / "a.npz", "adm": tmp_path / "adm.npz", "folder": tmp_path / "folder"}
    images.save_samples(out["zip"], pixels, labels)
    images.save_samples(out["npz"], pixels, labels)
    np.savez(out["adm"], arr_0=pixels, arr_1=labels.astype(np.int64))
    import zipfile

    with zipfile.ZipFile(out["zip"]) as archive:
        archive.extractall(out["folder"])
    return {name: str(path) for name, path in out.items()}, labels


@pytest.mark.parametrize("size", [4, 23, 100])
def test_every_kind_of_file_gives_the_same_images_labels_and_hash(files, pixels, size):
    paths, labels = files
    for path in paths.values():
        stream = streams.open_stream(path)
        np.testing.assert_array_equal(_all(stream, size), pixels)
        np.testing.assert_array_equal(_all(stream, size), pixels)  # and again
        assert len(next(stream.read(size))) == min(size, 23)
        np.testing.assert_array_equal(stream.labels, labels)
        assert stream.count == 23 and stream.image_shape == (6, 6, 3)
        digest = streams.begin_hash((23, 6, 6, 3))
        for part in stream.read(size):
            digest.update(np.ascontiguousarray(part).data)
        assert streams.end_hash(digest, stream.labels) == images_hash(pixels, labels)


def test_a_subset_is_the_one_that_edm_takes(files, pixels):
    paths, labels = files
    theirs = open_images(paths["zip"], max_size=9, subset_seed=3)
    for path in paths.values():
        stream = streams.open_stream(path, num=9, seed=3)
        np.testing.assert_array_equal(_all(stream), theirs.images)
        np.testing.assert_array_equal(stream.labels, theirs.labels)


def test_the_embedded_digits_by_name():
    stream, real = streams.open_stream("digits"), digits.load()
    np.testing.assert_array_equal(_all(stream), real.images)
    np.testing.assert_array_equal(stream.labels, real.labels)


def test_samples_without_classes_have_no_labels(tmp_path, pixels):
    images.save_samples(tmp_path / "a.npz", pixels)          # writes -1
    assert streams.open_stream(str(tmp_path / "a.npz")).labels is None


def _broken(tmp_path, kind, pixels):
    path = tmp_path / "x.npz"
    arrays = {"images": pixels}
    if kind == "nan":
        arrays["images"] = np.where(np.arange(23)[:, None, None, None] == 4, np.nan, pixels / 255.0)
    elif kind == "float":
        arrays["images"] = pixels / 255.0
    elif kind == "flat":
        arrays["images"] = pixels.reshape(23, -1)
    elif kind == "four channels":
        arrays["images"] = np.zeros((2, 4, 4, 4), np.uint8)
    elif kind == "other names":
        arrays = {"x": pixels}
    elif kind == "labels":
        arrays["labels"] = np.zeros(22, np.int32)
    elif kind == "objects":
        arrays["images"] = np.array([{}], object)
    np.savez(path, **arrays)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:900])
    elif kind == "text":
        path.write_text("not a zip")
    return str(path)


@pytest.mark.parametrize("kind, message", [
    ("nan", "1 of 23 images with NaN"), ("float", "float64 images, whose range nobody can know"), ("flat", r"uint8 \[23, 108\]"),
    ("four channels", r"\[2, 4, 4, 4\].* C = 1 or 3"), ("other names", "with x, allowed: an .npz with images"),
    ("labels", r"labels int32 \[22\]"), ("objects", "not a readable .npz|object"),
    ("cut", "truncated or corrupt"), ("text", "truncated or corrupt"),
])
def test_broken_files_are_refused_in_one_line(tmp_path, pixels, kind, message):
    with pytest.raises(ValueError, match=message) as error:
        streams.open_stream(_broken(tmp_path, kind, pixels))
    assert "\n" not in str(error.value)


def test_damage_inside_is_found_while_reading(tmp_path, pixels):
    path = tmp_path / "x.npz"
    np.savez(path, images=np.repeat(pixels, 50, axis=0))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    with pytest.raises(ValueError, match="truncated or corrupt"):
        _all(streams.open_stream(str(path)))


@pytest.mark.parametrize("path, message", [("missing.npz", "does not exist"), ("missing", "does not exist")])
def test_missing_files(tmp_path, path, message):
    with pytest.raises(ValueError, match=f"reference: got .*{message}"):
        streams.open_stream(str(tmp_path / path), key="reference")


def test_other_files_and_too_few_images(tmp_path, files):
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(ValueError, match="images: got .*x.txt.*, allowed"):
        streams.open_stream(str(tmp_path / "x.txt"))
    with pytest.raises(ValueError, match="images: got 23 images in .*, allowed: 24 or more"):
        streams.open_stream(files[0]["adm"], num=24)
