"""Images in EDM's layout (Karras et al. 2022, dataset_tool.py): a ZIP file or a folder of PNG or JPEG files.

Labels are in `dataset.json` at the top: {"labels": [["00000/img00000000.png", 6], ...]}, or {"labels": null}.
Samples are ordered by file name. `max_size` and `xflip` pick and double the samples exactly as EDM does, so
that index i means the same image as there.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os

import numpy as np
import PIL.Image

from sim_jax.data import archive as archives
from sim_jax.data import source as sources

EXTENSIONS = (".png", ".jpg", ".jpeg")
_OTHER_EXTENSIONS = (".bmp", ".gif", ".tif", ".tiff", ".webp", ".npy", ".ppm", ".jp2", ".avif")
CHANNELS = {"L": 1, "RGB": 3}   # PIL's name of the pixel format


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSource:
    """Decodes one image an access; see source.py for the interface.

    Attributes:
      archive: where the files are.
      names: the N files.
      labels: int32 [N].
      flips: bool [N], which samples are mirrored.
      size: the width and height of every file.
    """

    archive: archives.Folder | archives.Zip
    names: list[str]
    labels: np.ndarray
    flips: np.ndarray
    num_classes: int
    size: int
    channels: int
    resolution: int

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict:
        name = self.names[index]
        image = _decode(_open_image(self.archive, name, self.size, self.channels), self.archive, name)
        if self.flips[index]:
            image = image[:, ::-1]
        if self.resolution != self.size:
            image = sources.pad_image(image, self.resolution)
        return {"image": image, "label": int(self.labels[index])}


def _open_image(archive, name: str, size: int | None = None, channels: int | None = None) -> PIL.Image.Image:
    """Reads a file and checks its header, before any pixel is decoded."""
    data = archive.read(name)
    try:
        image = PIL.Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"path: {name!r} in {archive.where} is not a PNG or JPEG image ({error})") from error
    width, height = image.size
    if width != height:
        raise ValueError(f"path: got a {width}x{height} image, {name!r} in {archive.where}, "
                         f"allowed: square images")
    if size is not None and width != size:
        raise ValueError(f"path: got a {width}x{height} image, {name!r} in {archive.where}, "
                         f"allowed: {size}x{size} as the first image")
    if image.mode not in CHANNELS:
        raise ValueError(f"path: got pixel format {image.mode}, {name!r} in {archive.where}, "
                         f"allowed: 8-bit grey (L) or RGB")
    if channels is not None and CHANNELS[image.mode] != channels:
        raise ValueError(f"path: got {CHANNELS[image.mode]} channels, {name!r} in {archive.where}, "
                         f"allowed: {channels} as the first image")
    return image


def _decode(image: PIL.Image.Image, archive, name: str) -> np.ndarray:
    """The pixels, uint8 [H,W,C]."""
    try:
        pixels = np.asarray(image)
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"path: {name!r} in {archive.where} is a broken image ({error})") from error
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _image_names(archive) -> list[str]:
    """The names of all images, sorted."""
    other = next((name for name in archive.names if name.lower().endswith(_OTHER_EXTENSIONS)), None)
    if other is not None:
        raise ValueError(f"path: got {other!r} in {archive.where}, allowed images: {', '.join(EXTENSIONS)}")
    names = [name for name in archive.names if name.lower().endswith(EXTENSIONS)]
    if not names:
        raise ValueError(f"path: got no images in {archive.where}, allowed: at least one of "
                         f"{', '.join(EXTENSIONS)}")
    return names


def _label_entries(archive) -> list | None:
    """The `labels` list of dataset.json; None where there is none."""
    if archives.INDEX not in archive.names:
        return None
    where = f"{archives.INDEX} in {archive.where}"
    try:
        content = json.loads(archive.read(archives.INDEX))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"labels: {where} is not valid JSON ({error})") from error
    allowed = 'allowed: {"labels": [[file name, class], ...]} or {"labels": null}'
    if not isinstance(content, dict) or "labels" not in content:
        raise ValueError(f"labels: got no \"labels\" in {where}, {allowed}")
    entries = content["labels"]
    if entries is not None and not isinstance(entries, list):
        raise ValueError(f"labels: got {type(entries).__name__} in {where}, {allowed}")
    for entry in entries or ():
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
            raise ValueError(f"labels: got the entry {str(entry)[:80]} in {where}, {allowed}")
        if type(entry[1]) is not int:
            raise ValueError(f"labels: got class {str(entry[1])[:80]} for {entry[0]!r} in {where}, "
                             f"allowed: whole numbers from 0")
    return entries


def _read_labels(archive, names: list[str], label_dim: int | None) -> np.ndarray | None:
    """One class per image, int32 [N]; None where the data set has no labels."""
    entries = _label_entries(archive)
    if entries is None:
        return None
    where = f"{archives.INDEX} in {archive.where}"
    table = dict(entries)
    if len(table) != len(entries):
        seen = set()
        twice = next(name for name, _ in entries if name in seen or seen.add(name))
        raise ValueError(f"labels: got {twice!r} twice in {where}, allowed: one entry per image")
    missing = [name for name in names if name not in table]
    if missing:
        raise ValueError(f"labels: {where} lacks {len(missing)} of {len(names)} images, "
                         f"the first is {missing[0]!r}")
    if len(table) != len(names):
        extra = sorted(set(table).difference(names))
        raise ValueError(f"labels: {where} has {len(extra)} entries without an image, "
                         f"the first is {extra[0]!r}")
    limit = label_dim or np.iinfo(np.int32).max
    wrong = next((name for name in names if not 0 <= table[name] < limit), None)
    if wrong is not None:
        raise ValueError(f"labels: got class {table[wrong]} for {wrong!r} in {where}, "
                         f"allowed: 0 to {limit - 1}")
    return np.array([table[name] for name in names], np.int32)


def _select(count: int, max_size: int | None, xflip: bool, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Which files are samples, and which samples are mirrored: EDM's choice for its `random_seed`."""
    index = np.arange(count)
    if max_size is not None and max_size < count:
        np.random.RandomState(seed % (1 << 31)).shuffle(index)
        index = np.sort(index[:max_size])
    flips = np.zeros(len(index), bool)
    return (np.tile(index, 2), np.concatenate([flips, ~flips])) if xflip else (index, flips)


def open_images(path: str | os.PathLike, *, resolution: int | None = None, channels: int | None = None,
                label_dim: int | None = None, max_size: int | None = None, xflip: bool = False,
                subset_seed: int = 0, pad_to: int | None = None,
                cache_bytes: int = sources.CACHE_BYTES) -> sources.Source:
    """Opens a data set in EDM's layout; the index, the labels and the first image are checked now.

    Args:
      path: a .zip file or a folder.
      resolution: what `source.resolution` must be (None: whatever the images are), after `pad_to`.
      channels: what `source.channels` must be.
      label_dim: the number of classes of the network: labels must exist and lie below it. 0: ignore labels.
        None: take what there is.
      max_size: keep this many images, drawn with `subset_seed` as EDM draws them.
      xflip: append a mirrored copy of every sample.
      pad_to: pad with black to this resolution (MNIST: 32).
      cache_bytes: decode all images into memory if they fit; this also validates every one of them. Otherwise
        images are decoded on access, and `validate` checks them all.

    Raises:
      ValueError: anything wrong with the path, the archive, an image or the labels; it names the file.
    """
    if max_size is not None and max_size < 1:
        raise ValueError(f"max_size: got {max_size}, allowed: at least 1")
    archive = archives.open_archive(path)
    names = _image_names(archive)
    first = _open_image(archive, names[0])
    labels = None if label_dim == 0 else _read_labels(archive, names, label_dim)
    index, flips = _select(len(names), max_size, xflip, subset_seed)
    num_classes = 0 if labels is None else label_dim or int(labels.max()) + 1
    source = ImageSource(
        archive=archive, names=[names[i] for i in index], flips=flips, num_classes=num_classes,
        labels=np.zeros(len(index), np.int32) if labels is None else labels[index],
        size=first.width, channels=CHANNELS[first.mode],
        resolution=sources.check_padding(pad_to, first.width))
    where = f"{archive.where} (first image {names[0]!r})"
    sources.check_source(source, where, resolution=resolution, channels=channels, label_dim=label_dim)
    _decode(first, archive, names[0])
    return sources.cache(source, cache_bytes)


def validate(source: sources.Source):
    """Reads every file and its image header, without decoding pixels (about 40 microseconds a file).

    Raises:
      ValueError: a file is unreadable (a zip member fails its checksum), not an image, of another size, or of
        another number of channels; the message names it. A source in memory was checked when it was decoded.
    """
    if isinstance(source, ImageSource):
        for name in dict.fromkeys(source.names):
            _open_image(source.archive, name, source.size, source.channels)
