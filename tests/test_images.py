"""Grids, PNG, NPZ and ZIP: known pixels, round trips, and what a failing write leaves behind."""

from __future__ import annotations

import io
import json
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sim_jax import files, images


def _samples(number=7, height=8, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (number, height, height, channels), dtype=np.uint8)


def test_to_uint8_truncates_and_clips_as_edm():
    x = np.array([-2, -1, -1 / 127.5, 0, 0.5, 126.9 / 127.5, 1, 2], np.float32)
    by_hand = [0, 0, 127, 128, 191, 254, 255, 255]          # -1 -> 0.5 -> 0; 0.5 -> 191.75 -> 191; 1 -> 255.5
    np.testing.assert_array_equal(images.to_uint8(x), by_hand)
    eager, inside = images.to_uint8(jnp.asarray(x)), jax.jit(images.to_uint8)(x)
    assert isinstance(eager, jax.Array) and eager.dtype == jnp.uint8
    np.testing.assert_array_equal(eager, by_hand)
    np.testing.assert_array_equal(inside, by_hand)
    np.testing.assert_array_equal(images.to_uint8(jnp.asarray([0.5], jnp.bfloat16)), [191])


def test_every_uint8_survives_the_way_to_the_device_and_back():
    every = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(images.to_uint8(every / np.float32(127.5) - 1), every)


def test_to_uint8_refuses_what_is_converted_already():
    with pytest.raises(ValueError, match="uint8"):
        images.to_uint8(np.zeros(3, np.uint8))


def test_grid_puts_each_image_at_its_place():
    x = _samples(5)
    out = images.grid(x, columns=3, scale=2, pad=1)
    assert out.shape == (2 * 17 + 1, 3 * 17 + 1, 3)
    for index, image in enumerate(x):
        row, column = divmod(index, 3)
        cell = out[1 + 17 * row:17 * row + 17, 1 + 17 * column:17 * column + 17]
        np.testing.assert_array_equal(cell, np.kron(image, np.ones((2, 2, 1), np.uint8)))
    assert (out[0] == 255).all() and (out[18:, 35:] == 255).all()          # margin and the empty place
    np.testing.assert_array_equal(images.grid(x[:4], pad=0)[:8, 8:], x[1])      # a square by default


def test_grid_row_labels_go_to_the_left_and_leave_the_images():
    x = _samples(6, channels=1)
    bare = images.grid(x, columns=2, scale=None)
    labelled = images.grid(x, columns=2, scale=None, row_labels=["0 kimg", "10 kimg", "20 kimg"])
    margin = labelled.shape[1] - bare.shape[1]
    np.testing.assert_array_equal(labelled[:, margin:], bare)
    for row in range(3):                                                   # each row has some ink
        assert (labelled[49 * row:49 * (row + 1), :margin] < 128).any()
    with pytest.raises(ValueError, match="row_labels: got 2, allowed: 3"):
        images.grid(x, columns=2, row_labels=["a", "b"])


@pytest.mark.parametrize("bad", [np.zeros((2, 8, 8, 3), np.float32), np.zeros((2, 8, 8, 2), np.uint8),
                                 np.zeros((8, 8, 3), np.uint8), np.zeros((0, 8, 8, 3), np.uint8)])
def test_grid_refuses_other_images(bad):
    with pytest.raises(ValueError, match="images: got .*allowed: uint8"):
        images.grid(bad)


def test_side_by_side_holds_both_grids():
    left, right = _samples(6, seed=1), _samples(6, seed=2)
    out = images.side_by_side(left, right, columns=3, scale=4)
    for half, x in ((out[:, :100], left), (out[:, -100:], right)):
        np.testing.assert_array_equal(half[-67:], images.grid(x, columns=3, scale=4))
        assert (half[:-67] < 128).any()                                    # the title
    with pytest.raises(ValueError, match="right: got shape"):
        images.side_by_side(left, right[:5])


@pytest.mark.parametrize("channels", [1, 3])
def test_png_round_trip_with_metadata(tmp_path, channels):
    x = _samples(4, channels=channels)
    path = images.save_png(tmp_path / "new" / "x.png", x, columns=2,
                           metadata={"seed": 3, "command": "sim_jax.sample – é"})
    picture = Image.open(path)
    assert picture.mode == ("L" if channels == 1 else "RGB")
    np.testing.assert_array_equal(np.asarray(picture).reshape(99, 99, channels),
                                  images.grid(x, columns=2, scale=6))
    assert picture.text == {"seed": "3", "command": "sim_jax.sample – é"}
    images.save_png(path, x[0])
    np.testing.assert_array_equal(np.asarray(Image.open(path)).reshape(x[0].shape), x[0])


def test_npz_round_trip(tmp_path):
    x, labels = _samples(), np.arange(7)
    with np.load(images.save_samples(tmp_path / "x.npz", x, labels)) as stored:
        assert sorted(stored) == ["images", "labels"]
        assert stored["images"].dtype == np.uint8 and stored["labels"].dtype == np.int32
        np.testing.assert_array_equal(stored["images"], x)
        np.testing.assert_array_equal(stored["labels"], labels)
    with np.load(images.save_samples(tmp_path / "x.npz", x)) as stored:
        np.testing.assert_array_equal(stored["labels"], [-1] * 7)


@pytest.mark.parametrize("channels", [1, 3])
def test_zip_has_edms_layout(tmp_path, channels):
    x = np.resize(_samples(3, height=2, channels=channels), (1002, 2, 2, channels))
    path = images.save_samples(tmp_path / "x.zip", x, np.arange(1002) % 10)
    first = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        labels = json.loads(archive.read("dataset.json"))["labels"]
        assert labels[3] == ["00000/img00000003.png", 3] and labels[1001] == ["00001/img00001001.png", 1]
        assert archive.namelist() == [name for name, _ in labels] + ["dataset.json"]
        assert all(info.external_attr >> 16 == 0o644 for info in archive.infolist())
        stored = [np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name, _ in labels]
    np.testing.assert_array_equal(np.stack(stored).reshape(x.shape), x)
    images.save_samples(path, x, np.arange(1002) % 10)
    assert path.read_bytes() == first
    with zipfile.ZipFile(images.save_samples(path, x[:2])) as archive:
        assert json.loads(archive.read("dataset.json")) == {"labels": None}


def test_save_samples_refuses_other_suffixes_and_labels(tmp_path):
    with pytest.raises(ValueError, match=r"out: got .*x\.jpg.*\.png, \.npz, \.zip"):
        images.save_samples(tmp_path / "x.jpg", _samples())
    for labels in (np.zeros(6, int), np.zeros(7, np.float32), np.zeros((7, 1), int)):
        with pytest.raises(ValueError, match=r"labels: got .* allowed: integers \[7\]"):
            images.save_samples(tmp_path / "x.npz", _samples(), labels)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", images.SUFFIXES)
def test_a_target_that_cannot_be_written_is_named(tmp_path, suffix):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ValueError, match=r"out: got .*file.* allowed: a folder that can be written"):
        images.save_samples(tmp_path / "file" / f"x{suffix}", _samples())
    (tmp_path / f"folder{suffix}").mkdir()
    with pytest.raises(ValueError, match="a folder, allowed: a file"):
        images.save_samples(tmp_path / f"folder{suffix}", _samples())


@pytest.mark.parametrize("suffix", images.SUFFIXES)
def test_a_failing_write_leaves_the_old_file(tmp_path, suffix, monkeypatch):
    path = images.save_samples(tmp_path / f"x{suffix}", _samples(seed=1))
    old = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        images.save_samples(path, _samples(seed=2))
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


def test_a_write_cut_in_the_middle_leaves_the_old_file(tmp_path):
    path = files.write_atomically(tmp_path / "x", lambda file: file.write(b"old"))
    assert list(tmp_path.iterdir()) == [path]

    def cut(file):
        file.write(b"ne")
        file.flush()
        assert path.read_bytes() == b"old"             # readers see the old file meanwhile
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_atomically(path, cut)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
