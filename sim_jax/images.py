"""Images as people look at them: uint8 conversion, grids, and PNG, NPZ and ZIP files.

Images on the device are NHWC float32 in [-1, 1]; here they are uint8 [N, H, W, C] with C = 1 (grey) or 3
(RGB). The conversion is EDM's (Karras et al. 2022, public sampler): clip(x * 127.5 + 128, 0, 255), fraction
cut off.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from sim_jax import files

SUFFIXES = (".png", ".npz", ".zip")
NO_LABEL = -1                  # what an .npz holds as the label of an unconditional sample
_LARGE = 48                    # small images are shown at least this many pixels high
_BACKGROUND = 255


def to_uint8(images: Any) -> Any:
    """Float images in [-1, 1] to uint8 by clip(x * 127.5 + 128, 0, 255), truncated; any shape.

    Keeps the library: a numpy array gives a numpy array, a JAX array a JAX array (also inside jit). Inside
    jit XLA may fuse the product and the sum, so that a value within one rounding of an integer can differ
    from numpy's by one. Raises ValueError for integer input, which is most likely converted already.
    """
    if not hasattr(images, "astype"):
        images = np.asarray(images)
    if images.dtype.kind in "iub":
        raise ValueError(f"images: got dtype {images.dtype}, allowed: floating point in [-1, 1]")
    return (images.astype("float32") * 127.5 + 128).clip(0, 255).astype("uint8")


def presentable(images: np.ndarray) -> np.ndarray:
    """What a picture shows of float images [..., C]: themselves where C is 1 or 3; of latents their first three channels over 3, as colours
    (or the first alone, where there are two)."""
    images = np.asarray(images)
    channels = images.shape[-1]
    return images if channels in (1, 3) else images[..., :3] / 3 if channels > 3 else images[..., :1]


def _check(images: Any) -> np.ndarray:
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape:
        raise ValueError(f"images: got {images.dtype} {list(images.shape)}, "
                         "allowed: uint8 [N, H, W, C], not empty, with C = 1 or 3")
    return images


def _check_picture(picture: Any) -> np.ndarray:
    """A single picture as [H, W, C]; takes [H, W] as grey."""
    picture = np.asarray(picture)
    if picture.ndim == 2:
        picture = picture[:, :, None]
    if (picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] not in (1, 3)
            or 0 in picture.shape):
        raise ValueError(f"picture: got {picture.dtype} {list(picture.shape)}, "
                         "allowed: uint8 [H, W] or [H, W, C], not empty, with C = 1 or 3")
    return picture


def default_scale(height: int) -> int:
    """Whole factor that makes `height` pixels at least 48: 8 -> 6, 28 and 32 -> 2, 64 -> 1."""
    return max(1, -(-_LARGE // height))


def enlarge(images: np.ndarray, scale: int) -> np.ndarray:
    """Repeats pixels `scale` times in both directions (nearest neighbour); [..., H, W, C]."""
    return images.repeat(scale, axis=-3).repeat(scale, axis=-2)


def _text(text: str, *, size: int, channels: int) -> np.ndarray:
    """Dark text on the background, uint8 [height, width, C]."""
    font = ImageFont.load_default(size=size)
    left, top, right, bottom = font.getbbox(text or " ")
    picture = Image.new("L", (max(1, math.ceil(right - min(left, 0))), size + 3), _BACKGROUND)
    ImageDraw.Draw(picture).text((0, 0), text, fill=40, font=font)
    return np.repeat(np.asarray(picture)[:, :, None], channels, axis=2)


def grid(images: Any, *, columns: int | None = None, scale: int | None = 1, pad: int = 1,
         row_labels: Sequence[str] | None = None, background: int = _BACKGROUND) -> np.ndarray:
    """Images in rows, the first at the top left, with a margin of `pad` pixels around each.

    Args:
      images: uint8 [N, H, W, C].
      columns: images in a row; None: the smallest square that holds all.
      scale: whole factor by which images (not the margin) are enlarged; None: `default_scale(H)`.
      pad: pixels of margin.
      row_labels: one text a row, drawn to its left.
      background: grey value of the margin and of empty places.

    Returns: uint8 [H', W', C]; without labels H' = rows * (H * scale + pad) + pad, W' alike.
    Raises: ValueError for other images, for columns or scale < 1, or where labels and rows differ in number.
    """
    images = _check(images)
    scale = default_scale(images.shape[1]) if scale is None else scale
    columns = math.ceil(math.sqrt(len(images))) if columns is None else columns
    for key, value, least in (("columns", columns, 1), ("scale", scale, 1), ("pad", pad, 0)):
        if value < least:
            raise ValueError(f"{key}: got {value}, allowed: {least} or more")
    height, width, channels = images.shape[1] * scale, images.shape[2] * scale, images.shape[3]
    rows = -(-len(images) // columns)
    shape = (rows * (height + pad) + pad, columns * (width + pad) + pad, channels)
    out = np.full(shape, background, np.uint8)
    for index, image in enumerate(enlarge(images, scale)):
        row, column = divmod(index, columns)
        top, left = pad + row * (height + pad), pad + column * (width + pad)
        out[top:top + height, left:left + width] = image
    if row_labels is None:
        return out
    if len(row_labels) != rows:
        raise ValueError(f"row_labels: got {len(row_labels)}, allowed: {rows}, one a row")
    return np.concatenate([_row_labels(row_labels, height, pad, len(out), channels), out], axis=1)


def _row_labels(labels: Sequence[str], height: int, pad: int, total: int,
                channels: int) -> np.ndarray:
    """The column of texts to the left of a grid, each beside the middle of its row; [total, width, C]."""
    texts = [_text(label, size=max(6, min(13, height - 3)), channels=channels) for label in labels]
    out = np.full((total, max(text.shape[1] for text in texts) + 8, channels), _BACKGROUND, np.uint8)
    for row, text in enumerate(texts):
        text = text[:min(len(text), height)]
        top = pad + row * (height + pad) + (height - len(text)) // 2
        out[top:top + len(text), 4:4 + text.shape[1]] = text
    return out


def side_by_side(left: Any, right: Any, *, titles: tuple[str, str] = ("teacher", "generator"),
                 columns: int | None = None, scale: int | None = None, pad: int = 1) -> np.ndarray:
    """Two grids of images beside each other under their titles: teacher and generator from the same noise.

    Args:
      left, right: uint8 [N, H, W, C], the same shape, the same place meaning the same noise and label.
      titles: a text above each.
      columns, scale, pad: as for `grid`; scale None enlarges small images.

    Returns: uint8 [H', W', C].
    Raises: ValueError where the shapes differ.
    """
    left, right = _check(left), _check(right)
    if left.shape != right.shape:
        raise ValueError(f"right: got shape {list(right.shape)}, allowed: {list(left.shape)}, as on the left")
    halves = []
    for images, title in zip((left, right), titles, strict=True):
        picture = grid(images, columns=columns, scale=scale, pad=pad)
        text = _text(title, size=14, channels=picture.shape[2])
        width = max(picture.shape[1], text.shape[1] + 4)
        half = np.full((len(text) + 6 + len(picture), width, picture.shape[2]), _BACKGROUND, np.uint8)
        half[3:3 + len(text), 4:4 + min(text.shape[1], width - 4)] = text[:, :width - 4]
        half[len(text) + 6:, :picture.shape[1]] = picture
        halves.append(half)
    gap = np.full((len(halves[0]), 16, halves[0].shape[2]), _BACKGROUND, np.uint8)
    return np.concatenate([halves[0], gap, halves[1]], axis=1)


def png_bytes(picture: Any, *, metadata: Mapping[str, Any] | None = None) -> bytes:
    """One picture, uint8 [H, W] or [H, W, C], as PNG; `metadata` becomes text chunks, as JSON if not text."""
    picture = _check_picture(picture)
    info = PngImagePlugin.PngInfo()
    for key, value in (metadata or {}).items():
        info.add_itxt(key, value if isinstance(value, str) else json.dumps(value, default=str))
    buffer = io.BytesIO()
    Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def save_png(path: str | Path, images: Any, *, columns: int | None = None, scale: int | None = None,
             pad: int = 1, metadata: Mapping[str, Any] | None = None) -> Path:
    """Writes a PNG, atomically: [N, H, W, C] as a `grid`, [H, W] or [H, W, C] as the picture it is.

    `scale` None enlarges small images of a batch and leaves a picture alone. Raises ValueError as `grid` and
    `files.write_atomically` do.
    """
    images = np.asarray(images)
    if images.ndim == 4:
        picture = grid(images, columns=columns, scale=scale, pad=pad)
    else:
        picture = enlarge(_check_picture(images), scale or 1)
    data = png_bytes(picture, metadata=metadata)
    return files.write_atomically(path, lambda file: file.write(data))


def save_folder(folder: str | Path, images: Any, *, about: Sequence[Mapping[str, Any]]) -> Path:
    """Writes image i as `NNNNNN.png` into a folder, atomically each, with `about[i]` as its text.

    Raises: ValueError for other images, another number of texts, or a folder that cannot be written.
    """
    images, folder = _check(images), files.make_folder(folder, key="out")
    for index, (image, text) in enumerate(zip(images, about, strict=True)):
        save_png(folder / f"{index:06d}.png", image, metadata=text)
    return folder


def check_samples_path(path: str | Path) -> Path:
    """The path, or ValueError where `save_samples` does not know its suffix; worth a call before sampling."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"out: got {str(path)!r}, allowed: a file ending in {', '.join(SUFFIXES)}")
    return path


def save_samples(path: str | Path, images: Any, labels: Any = None, *, columns: int | None = None,
                 metadata: Mapping[str, Any] | None = None) -> Path:
    """Writes samples, atomically, in the format that the suffix names.

    - `.png`: one grid (`columns`, small images enlarged, `metadata` as text).
    - `.npz`: `images` uint8 [N, H, W, C] and `labels` int32 [N], -1 where there are none.
    - `.zip`: EDM's dataset layout, `NNNNN/imgNNNNNNNN.png` and `dataset.json` with
      `{"labels": [[name, class], ...]}`, or `{"labels": null}` without. The same samples give the same bytes.

    Args:
      path: where to.
      images: uint8 [N, H, W, C], C = 1 or 3.
      labels: integers [N], or None.
      columns, metadata: for `.png` only.

    Returns: the path.
    Raises: ValueError for another suffix, other images or labels, or a path that cannot be written.
    """
    path, images = check_samples_path(path), _check(images)
    if labels is not None:
        labels = np.asarray(labels)
        if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
            raise ValueError(f"labels: got {labels.dtype} {list(labels.shape)}, "
                             f"allowed: integers [{len(images)}], one an image")
    if path.suffix.lower() == ".png":
        return save_png(path, images, columns=columns, metadata=metadata)
    write = _write_npz if path.suffix.lower() == ".npz" else _write_zip
    return files.write_atomically(path, lambda file: write(file, images, labels))


def _write_npz(file: BinaryIO, images: np.ndarray, labels: np.ndarray | None) -> None:
    labels = np.full(len(images), NO_LABEL) if labels is None else labels
    np.savez_compressed(file, images=images, labels=labels.astype(np.int32))


def _write_zip(file: BinaryIO, images: np.ndarray, labels: np.ndarray | None) -> None:
    names = [f"{index:08d}" for index in range(len(images))]
    names = [f"{name[:5]}/img{name}.png" for name in names]
    pairs = None
    if labels is not None:
        pairs = [[name, int(label)] for name, label in zip(names, labels, strict=True)]

    def add(name: str, data: bytes | str) -> None:
        info = zipfile.ZipInfo(name)                 # its date is fixed: the same samples, the same bytes
        info.external_attr = 0o644 << 16             # without it unzip makes unreadable files
        archive.writestr(info, data)

    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, image in zip(names, images, strict=True):
            add(name, png_bytes(image))
        add("dataset.json", json.dumps({"labels": pairs}))
