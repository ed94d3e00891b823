"""Images in EDM's layout: what is read, and that everything broken is named before training."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
import pytest

from sim_jax.data import archive, images, make_source
from sim_jax.data.source import ArraySource, gather


def picture(value, shape=(6, 6, 3)) -> np.ndarray:
    """A distinct picture for each value, not symmetric in any way."""
    return np.random.default_rng(value).integers(0, 256, shape, dtype=np.uint8)


def encode(pixels: np.ndarray, kind="PNG", mode=None) -> bytes:
    image = PIL.Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    out = io.BytesIO()
    (image.convert(mode) if mode else image).save(out, kind)
    return out.getvalue()


def names(count: int) -> list[str]:
    return [f"{i // 4:05d}/img{i:08d}.png" for i in range(count)]


def files_of(count: int = 8, shape=(6, 6, 3), labels="mod 3") -> dict[str, bytes]:
    """EDM's layout as {name: bytes}."""
    files = {name: encode(picture(i, shape)) for i, name in enumerate(names(count))}
    if labels == "mod 3":
        labels = [[name, i % 3] for i, name in enumerate(names(count))]
    files["dataset.json"] = json.dumps({"labels": labels}).encode()
    return files


def write_zip(path, files: dict[str, bytes], compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in files.items():
            file.writestr(name, data)
    return path


def write_folder(path, files: dict[str, bytes]):
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def refused(match: str, path, **knobs):
    with pytest.raises(ValueError, match=match) as info:
        images.open_images(path, **knobs)
    assert "\n" not in str(info.value)
    return str(info.value)


# ---- what is read ----

@pytest.mark.parametrize("kind", ["zip", "deflated", "folder"])
@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_round_trip_in_sorted_order(tmp_path, kind, cache_bytes):
    files = dict(reversed(files_of().items()))      # stored in another order
    if kind == "folder":
        path = write_folder(tmp_path / "data", files)
    else:
        path = write_zip(tmp_path / "data.zip", files, zipfile.ZIP_DEFLATED if kind == "deflated" else 0)
    source = images.open_images(path, resolution=6, channels=3, label_dim=3, cache_bytes=cache_bytes)
    assert isinstance(source, ArraySource if cache_bytes else images.ImageSource)
    assert (len(source), source.resolution, source.channels, source.num_classes) == (8, 6, 3, 3)
    for i in range(8):
        np.testing.assert_array_equal(source[i]["image"], picture(i))
        assert source[i]["label"] == i % 3
    batch, labels = gather(source, np.array([5, 1]))
    np.testing.assert_array_equal(batch, [picture(5), picture(1)])
    assert labels.dtype == np.int32 and labels.tolist() == [2, 1]


def test_jpeg_and_grey(tmp_path):
    files = {f"{i}.JPG": encode(np.full((8, 8, 1), 40 * i, np.uint8), "JPEG") for i in range(4)}
    source = images.open_images(write_folder(tmp_path / "data", files))
    assert (source.channels, source.num_classes) == (1, 0)
    assert [int(source[i]["image"].mean()) for i in range(4)] == [0, 40, 80, 120]
    assert source[3]["label"] == 0


def test_padding_puts_the_image_in_the_middle_of_black(tmp_path):
    path = write_zip(tmp_path / "a.zip", files_of(shape=(5, 5, 1)))
    source = images.open_images(path, pad_to=8, resolution=8, cache_bytes=0)
    image = source[2]["image"]
    assert image.shape == (8, 8, 1) and source.resolution == 8
    np.testing.assert_array_equal(image[1:6, 1:6], picture(2, (5, 5, 1)))
    image[1:6, 1:6] = 0
    assert not image.any()
    refused("pad_to: got 4", path, pad_to=4)


def test_subset_and_mirroring_are_edms(tmp_path):
    path = write_zip(tmp_path / "a.zip", files_of(10))
    order = np.arange(10)
    np.random.RandomState(7).shuffle(order)
    kept = np.sort(order[:4])
    source = images.open_images(path, max_size=4, subset_seed=7, xflip=True)
    assert len(source) == 8
    for i in range(4):
        np.testing.assert_array_equal(source[i]["image"], picture(kept[i]))
        np.testing.assert_array_equal(source[4 + i]["image"], picture(kept[i])[:, ::-1])
        assert source[i]["label"] == source[4 + i]["label"] == kept[i] % 3
    refused("max_size: got 0", path, max_size=0)


def test_labels_may_be_absent_or_ignored(tmp_path):
    plain = write_zip(tmp_path / "a.zip", files_of(labels=None))
    assert images.open_images(plain).num_classes == 0
    refused("label_dim: got 3, allowed: 0", plain, label_dim=3)
    broken = write_zip(tmp_path / "b.zip", files_of(labels="nonsense"))
    assert images.open_images(broken, label_dim=0)[1]["label"] == 0


def test_the_networks_classes_count_where_given(tmp_path):
    path = write_zip(tmp_path / "a.zip", files_of())
    assert images.open_images(path).num_classes == 3
    assert images.open_images(path, label_dim=10).num_classes == 10


def test_threads_pickling_and_another_process_id(tmp_path, monkeypatch):
    source = images.open_images(write_zip(tmp_path / "a.zip", files_of(40)), cache_bytes=0)
    copy = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(8) as pool:
        for one in (source, copy):
            decoded = list(pool.map(lambda i: one[i]["image"], list(range(40)) * 3))
            np.testing.assert_array_equal(decoded, [picture(i) for i in range(40)] * 3)
    before = source.archive._file
    monkeypatch.setattr(archive.os, "getpid", lambda: -1)   # as after a fork: the file is opened anew
    np.testing.assert_array_equal(source[3]["image"], picture(3))
    assert source.archive._file is not before


def test_bookkeeping_files_are_not_images(tmp_path):
    files = {**files_of(), "__MACOSX/._img.png": b"x", ".thumbs/a.png": b"x", "00000/._img00000000.png": b"x"}
    assert len(images.open_images(write_zip(tmp_path / "a.zip", files))) == 8


def test_real_cifar10_and_mnist(shared_dir):
    cifar = images.open_images(shared_dir / "data" / "cifar10-32x32.zip", resolution=32, channels=3,
                               label_dim=10, cache_bytes=0)
    assert len(cifar) == 50_000 and [cifar[i]["label"] for i in range(10)] == list(range(10))
    assert cifar[49_999]["image"].shape == (32, 32, 3)
    np.testing.assert_array_equal(np.bincount(cifar.labels), [5000] * 10)
    mnist = make_source("images", path=shared_dir / "data" / "mnist-28x28.zip", pad_to=32, resolution=32,
                        channels=1, label_dim=10, max_size=200)
    assert mnist.images.shape == (200, 32, 32, 1)
    assert not mnist.images[:, :2].any() and mnist.images.mean() > 20


# ---- broken archives ----

def test_missing_or_wrong_path(tmp_path):
    refused("does not exist", tmp_path / "none.zip")
    (tmp_path / "a.tar").write_bytes(b"x")
    refused("neither.*allowed: a folder of images or a .zip", tmp_path / "a.tar")


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_truncated_zip(tmp_path, keep):
    data = write_zip(tmp_path / "a.zip", files_of()).read_bytes()
    (tmp_path / "a.zip").write_bytes(data[:int(len(data) * keep)])
    refused("a.zip is not a readable zip file.*truncated", tmp_path / "a.zip")


def corrupt(path, name: str):
    """Flips one byte in the middle of a member."""
    with zipfile.ZipFile(path) as file:
        info = file.getinfo(name)
    data = bytearray(path.read_bytes())
    data[info.header_offset + 30 + len(name) + info.compress_size // 2] ^= 0xFF
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_corrupt_member_is_named(tmp_path, compression):
    path = write_zip(tmp_path / "a.zip", files_of(), compression)
    corrupt(path, names(8)[5])
    assert names(8)[5] in refused("may be truncated or corrupt", path)
    source = images.open_images(path, cache_bytes=0)      # the first image is whole
    with pytest.raises(ValueError, match=names(8)[5]):
        images.validate(source)
    corrupt(path, names(8)[0])
    refused(names(8)[0], path, cache_bytes=0)


def test_zip_without_images(tmp_path):
    refused("got no images", write_zip(tmp_path / "a.zip", {"dataset.json": b"{}", "readme.txt": b""}))
    refused("got no images", write_zip(tmp_path / "b.zip", {}))
    (tmp_path / "empty").mkdir()
    refused("got no images", tmp_path / "empty")


@pytest.mark.parametrize("name", ["../up.png", "a/../../up.png", "/root.png", "C:/up.png"])
def test_names_that_leave_the_archive(tmp_path, name):
    refused("without '..'", write_zip(tmp_path / "a.zip", {**files_of(), name: encode(picture(0))}))


def test_absurd_declared_size(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "a.zip", {**files_of(), "z.png": b"\0" * 5000}, zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(archive, "MAX_FILE_BYTES", 4000)
    refused("got 5000 bytes declared by 'z.png'", path)
    refused("got 5000 bytes", write_folder(tmp_path / "f", {"z.png": b"\0" * 5000}))


def test_image_that_declares_absurd_dimensions(tmp_path):
    """A few bytes of PNG that would decode to gigabytes are refused from the header."""
    bomb = bytearray(encode(picture(0)))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    refused("'0.png'.*decompression bomb", write_zip(tmp_path / "a.zip", {"0.png": bytes(bomb)}))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicate_member(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.png", encode(picture(0)))
        file.writestr("a.png", encode(picture(1)))
    refused("got 'a.png' twice", path)


# ---- broken images ----

def test_unexpected_size_and_channels_of_the_data_set(tmp_path):
    path = write_zip(tmp_path / "a.zip", files_of())
    message = refused("resolution: got 6x6.*allowed: 32x32", path, resolution=32, cache_bytes=0)
    assert names(1)[0] in message
    refused("channels: got 3.*allowed: 1", path, channels=1)


BAD_IMAGES = [
    (encode(picture(0, (7, 7, 3))), "7x7 image.*allowed: 6x6"),
    (encode(picture(0, (6, 7, 3))), "7x6 image.*allowed: square"),
    (encode(picture(0, (6, 6, 1))), "1 channels.*allowed: 3"),
    (encode(picture(0), mode="P"), "pixel format P"),
    (encode(picture(0), mode="RGBA"), "pixel format RGBA"),
    (b"not an image", "not a PNG or JPEG"),
    (b"", "not a PNG or JPEG"),
    (encode(picture(0), "GIF"), "not a PNG or JPEG"),
]


@pytest.mark.parametrize("data,match", BAD_IMAGES, ids=[match[:16] for _, match in BAD_IMAGES])
@pytest.mark.parametrize("where", ["zip", "folder"])
def test_bad_image_is_named(tmp_path, data, match, where):
    bad = names(8)[6]
    files = {**files_of(), bad: data}
    path = write_zip(tmp_path / "a.zip", files) if where == "zip" else write_folder(tmp_path / "a", files)
    assert bad in refused(match, path)      # decoded into memory: all are checked
    source = images.open_images(path, cache_bytes=0)
    with pytest.raises(ValueError, match=match) as info:
        images.validate(source)
    assert bad in str(info.value)
    with pytest.raises(ValueError, match=match):
        source[6]


def test_first_image_is_decoded_at_once(tmp_path):
    cut = encode(picture(0, (64, 64, 3)))[:3000]
    refused("'0.png'.*broken image", write_zip(tmp_path / "a.zip", {"0.png": cut}), cache_bytes=0)


def test_other_image_formats_are_not_skipped_silently(tmp_path):
    refused("got 'b.webp'", write_zip(tmp_path / "a.zip", {**files_of(), "b.webp": b"x"}))


def test_validate_accepts_what_is_whole(tmp_path):
    path = write_zip(tmp_path / "a.zip", files_of())
    images.validate(images.open_images(path, cache_bytes=0, xflip=True))
    images.validate(images.open_images(path))


# ---- labels that disagree ----

def labelled(**changes) -> list:
    return [[name, changes.get(f"at_{i}", i % 3)] for i, name in enumerate(names(8))]


BAD_LABELS = [
    (labelled()[:-1], f"lacks 1 of 8 images.*{names(8)[7]}"),
    (labelled() + [["x.png", 0]], "1 entries without an image.*'x.png'"),
    (labelled()[:-1] + [["x.png", 0]], "lacks 1 of 8"),
    (labelled() + [[names(8)[3], 0]], f"'{names(8)[3]}' twice"),
    (labelled(at_2=1.5), f"got class 1.5 for '{names(8)[2]}'"),
    (labelled(at_2="cat"), "got class cat"),
    (labelled(at_2=True), "got class True"),
    (labelled(at_2=None), "got class None"),
    (labelled(at_2=[0, 1]), r"got class \[0, 1\]"),
    (labelled(at_4=3), f"got class 3 for '{names(8)[4]}'.*allowed: 0 to 2"),
    (labelled(at_4=-1), "got class -1.*allowed: 0 to 2"),
    (labelled(at_4=10 ** 30), "got class 1000.*allowed: 0 to 2"),
    ({"a": 1}, "got dict"),
    ([["a.png"]], "got the entry"),
    ([7], "got the entry 7"),
    ([[1, 2]], "got the entry"),
]


@pytest.mark.parametrize("labels,match", BAD_LABELS, ids=[match[:20] for _, match in BAD_LABELS])
def test_label_file_that_disagrees(tmp_path, labels, match):
    refused("labels: .*" + match, write_zip(tmp_path / "a.zip", files_of(labels=labels)), label_dim=3)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[]", b"{}", b"3", b"[" * 100_000])
def test_malformed_dataset_json(tmp_path, content):
    files = {**files_of(), "dataset.json": content}
    refused("labels: .*dataset.json", write_zip(tmp_path / "a.zip", files))


def test_negative_class_without_a_known_number_of_classes(tmp_path):
    refused("got class -1", write_zip(tmp_path / "a.zip", files_of(labels=labelled(at_4=-1))))
