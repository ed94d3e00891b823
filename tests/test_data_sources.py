"""The embedded digits, TFDS without TensorFlow, and the table of sources."""

from __future__ import annotations

import io
import json
import pathlib
import sys

import numpy as np
import PIL.Image
import pytest

from sim_jax.data import digits, make_source
from sim_jax.data import source as sources
from sim_jax.data.tfds import TfdsSource

# ---- digits ----

def test_digits_are_scikit_learns():
    datasets = pytest.importorskip("sklearn.datasets")
    theirs = datasets.load_digits()
    ours = digits.load(resolution=8, channels=1, label_dim=10)
    np.testing.assert_array_equal(ours.images[..., 0], np.round(theirs.images * 255 / 16))
    np.testing.assert_array_equal(ours.labels, theirs.target)


def test_digits_values_and_counts():
    source = digits.load()
    assert source.images.shape == (1797, 8, 8, 1) and source.images.dtype == np.uint8
    assert (source.images.min(), source.images.max()) == (0, 255)
    assert set(np.unique(source.images)) == {round(v * 255 / 16) for v in range(17)}
    assert np.bincount(source.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert source[0]["label"] == 0 and source[0]["image"].shape == (8, 8, 1)


def test_digits_halves_partition_each_class_evenly():
    labels = digits.load().labels
    first, second = digits.halves(labels)
    np.testing.assert_array_equal(np.sort(np.concatenate([first, second])), np.arange(1797))
    assert abs(len(first) - len(second)) <= 1
    difference = np.bincount(labels[first]) - np.bincount(labels[second])
    assert np.abs(difference).max() <= 1
    np.testing.assert_array_equal(first, digits.halves(labels)[0])


@pytest.mark.parametrize("knobs,match", [(dict(resolution=32), "got 8x8.*allowed: 32x32"),
                                         (dict(channels=3), "channels: got 1"),
                                         (dict(label_dim=5), "label_dim: got 5, allowed: at least 10")])
def test_digits_for_the_wrong_network_are_refused(knobs, match):
    with pytest.raises(ValueError, match=match):
        digits.load(**knobs)


# ---- the table ----

def test_table():
    assert make_source("none") is None
    assert len(make_source("digits", resolution=8)) == 1797
    with pytest.raises(ValueError, match="data: got 'cifar', allowed: digits, images, scenes, tfds, none"):
        make_source("cifar")
    with pytest.raises(ValueError, match="data.path: got 'x', allowed with 'digits': resolution"):
        make_source("digits", path="x")
    with pytest.raises(ValueError, match="data.path: got 'x', allowed with 'none': no options"):
        make_source("none", path="x")
    with pytest.raises(ValueError, match="data.path: got nothing"):
        make_source("images")


def test_memory_source_checks_its_arrays():
    with pytest.raises(ValueError, match="allowed: uint8"):
        sources.ArraySource(np.zeros([2, 4, 4, 1], np.float32), np.zeros(2, np.int32), 1)
    with pytest.raises(ValueError, match="allowed: uint8"):
        sources.ArraySource(np.zeros([2, 4, 5, 1], np.uint8), np.zeros(2, np.int32), 1)
    with pytest.raises(ValueError, match="allowed: int32"):
        sources.ArraySource(np.zeros([2, 4, 4, 1], np.uint8), np.zeros(3, np.int32), 1)


# ---- TFDS ----

@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> pathlib.Path:
    """A TFDS data set prepared without TensorFlow, which works where examples are encoded images."""
    tfds = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record")

    class TinyDots(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
                "image": tfds.features.Image(shape=(6, 6, 3)),
                "label": tfds.features.ClassLabel(num_classes=3)}))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(7):
                png = io.BytesIO()
                PIL.Image.fromarray(np.full((6, 6, 3), 30 * i, np.uint8)).save(png, "PNG")
                yield i, {"image": png.getvalue(), "label": i % 3}

    root = tmp_path_factory.mktemp("tfds")
    TinyDots(data_dir=root, file_format="array_record").download_and_prepare()
    return root


@pytest.mark.parametrize("knobs", [dict(dataset="tiny_dots"), dict(dataset="tiny_dots", cache_bytes=0),
                                   dict(dataset="tiny_dots", pad_to=8, cache_bytes=0), dict(folder=True)])
def test_tfds_is_read_without_tensorflow(tiny, knobs):
    loaded_before = "tensorflow" in sys.modules     # by another test, where it is installed
    if knobs.pop("folder", False):
        source = make_source("tfds", dataset=str(tiny / "tiny_dots" / "1.0.0"))
    else:
        source = make_source("tfds", data_dir=str(tiny), **knobs)
    size = knobs.get("pad_to", 6)
    assert (len(source), source.resolution, source.channels, source.num_classes) == (7, size, 3, 3)
    values = [source[i]["image"].max() for i in range(7)]
    assert sorted(values) == [30 * i for i in range(7)]
    assert all(source[i]["label"] == values[i] // 30 % 3 for i in range(7))
    assert ("tensorflow" in sys.modules) == loaded_before


def test_tfds_slices_and_ignored_labels(tiny):
    source = make_source("tfds", dataset="tiny_dots", data_dir=str(tiny), split="train[:3]", label_dim=0)
    assert len(source) == 3 and source.num_classes == 0 and not source.labels.any()


@pytest.mark.parametrize("knobs,match", [
    (dict(split="test"), "split: got 'test', allowed: train"), (dict(split="train[:"), "split"),
    (dict(label_dim=2), "label_dim: got 2, allowed: at least 3"), (dict(resolution=32), "got 6x6"),
    (dict(channels=1), "channels: got 3"), (dict(image_key="x"), "image_key: got 'x', allowed: image, label"),
    (dict(label_key="x", label_dim=3), "no labels"), (dict(pad_to=4), "pad_to")])
def test_tfds_mismatches_are_refused(tiny, knobs, match):
    with pytest.raises(ValueError, match=match) as info:
        make_source("tfds", dataset="tiny_dots", data_dir=str(tiny), **knobs)
    assert "\n" not in str(info.value)


def test_tfds_not_prepared_names_the_command(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    command = f"tfds build cifar10 --file_format=array_record --data_dir={tmp_path}"
    with pytest.raises(ValueError, match="not prepared") as info:
        make_source("tfds", dataset="cifar10", data_dir=str(tmp_path))
    assert command in str(info.value) and "\n" not in str(info.value)


def test_tfds_unknown_names_are_refused(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(ValueError, match="dataset: got 'no_such_data'"):
        make_source("tfds", dataset="no_such_data", data_dir=str(tmp_path))
    with pytest.raises(ValueError, match="imagenet_resized/65x65.*not found") as info:
        make_source("tfds", dataset="imagenet_resized/65x65", data_dir=str(tmp_path))
    assert "\n" not in str(info.value)


def test_tfds_prepared_in_another_format(tiny, tmp_path):
    """As TFDS records it: the format stands in dataset_info.json."""
    folder = tmp_path / "tiny_dots" / "1.0.0"
    folder.mkdir(parents=True)
    for file in (tiny / "tiny_dots" / "1.0.0").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    info = json.loads((folder / "dataset_info.json").read_text())
    assert info["fileFormat"] == "array_record"
    (folder / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "tfrecord"}))
    for knobs in (dict(dataset="tiny_dots", data_dir=str(tmp_path)), dict(dataset=str(folder))):
        with pytest.raises(ValueError, match="tfds build tiny_dots/1.0.0 --file_format=array_record"):
            make_source("tfds", **knobs)


def test_tfds_mock_of_cifar10():
    tfds = pytest.importorskip("tensorflow_datasets")
    with tfds.testing.mock_data(num_examples=4):
        examples = tfds.data_source("cifar10", split="train")
        source = TfdsSource(examples, "cifar10", "image", "label", 10, 32, 3, 32)
        images, labels = sources.gather(source, np.array([3, 0]))
    assert images.shape == (2, 32, 32, 3) and images.dtype == np.uint8 and labels.max() < 10
