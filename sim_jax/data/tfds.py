"""TensorFlow Datasets, read without TensorFlow.

A data set has to be prepared once, as array_record files, by an environment that has TensorFlow:

    pip install tensorflow-datasets tensorflow-cpu
    tfds build cifar10 --file_format=array_record --data_dir=DIR

(`tfds build imagenet_resized/64x64 ...` likewise). From then on only tensorflow-datasets, array_record and
pillow are needed. Where it was prepared as TFRecord before, give the command another DIR.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import numpy as np

from sim_jax.data import source as sources


@dataclasses.dataclass(frozen=True, eq=False)
class TfdsSource:
    """Decodes one example an access; see source.py for the interface."""

    examples: Any
    where: str
    image_key: str
    label_key: str
    num_classes: int
    size: int
    channels: int
    resolution: int

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict:
        example = self.examples[int(index)]
        image = example[self.image_key]
        if image.shape != (self.size, self.size, self.channels) or image.dtype != np.uint8:
            raise ValueError(f"data: got image {index} of {self.where} as {image.dtype} {image.shape}, "
                             f"allowed: uint8 {(self.size, self.size, self.channels)}")
        if self.resolution != self.size:
            image = sources.pad_image(image, self.resolution)
        label = int(example[self.label_key]) if self.num_classes else 0
        if self.num_classes and not 0 <= label < self.num_classes:
            raise ValueError(f"data: got class {label} for image {index} of {self.where}, "
                             f"allowed: 0 to {self.num_classes - 1}")
        return {"image": image, "label": label}


def _prepare_command(dataset: str, data_dir: str | None) -> str:
    command = f"tfds build {dataset} --file_format=array_record"
    return f"{command} --data_dir={data_dir}" if data_dir else command


def _open_builder(dataset: str, data_dir: str | None):
    """The builder of a prepared data set: by name, or from the folder that holds its dataset_info.json."""
    import tensorflow_datasets as tfds  # slow to import, and not needed by other sources

    if os.path.isfile(os.path.join(dataset, "dataset_info.json")):
        return tfds.builder_from_directory(dataset)
    try:
        # No file_format: a data set prepared in another one is better reported by as_data_source.
        builder = tfds.builder(dataset, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(f"dataset: got {dataset!r}, allowed: the name of a TFDS data set, or a folder that "
                         f"holds dataset_info.json") from error
    except ValueError as error:   # an unknown config or version
        raise ValueError(f"dataset: got {dataset!r}, which TFDS refuses: "
                         f"{' '.join(str(error).split())[:300]}") from error
    if not builder.is_prepared():
        raise ValueError(f"dataset: got {dataset!r}, which is not prepared in {builder.data_dir}; once, with "
                         f"TensorFlow installed, run: {_prepare_command(dataset, data_dir)}")
    return builder


def open_tfds(dataset: str, *, split: str = "train", data_dir: str | None = None, image_key: str = "image",
              label_key: str = "label", resolution: int | None = None, channels: int | None = None,
              label_dim: int | None = None, pad_to: int | None = None,
              cache_bytes: int = sources.CACHE_BYTES) -> sources.Source:
    """Opens a prepared TFDS data set; the first image is checked now.

    Args:
      dataset: such as "cifar10" or "imagenet_resized/64x64", or a folder that holds dataset_info.json.
      split: a split or a slice of one, such as "train[:80%]".
      data_dir: where it was prepared; None for TFDS's own default (~/tensorflow_datasets or $TFDS_DATA_DIR).
      image_key, label_key: the names of the features.
      resolution, channels, label_dim: what the caller expects (None: anything; label_dim 0: ignore labels).
      pad_to: pad with black to this resolution.
      cache_bytes: decode all images into memory if they fit.

    Raises:
      ValueError: unknown, not prepared (the message has the command that prepares it), or not as expected.
    """
    builder = _open_builder(dataset, data_dir)
    features, where = builder.info.features, f"{dataset} ({split})"
    if image_key not in features:
        raise ValueError(f"image_key: got {image_key!r}, allowed: {', '.join(features)}")
    num_classes = getattr(features[label_key], "num_classes", None) if label_key in features else None
    try:
        examples = builder.as_data_source(split)
    except NotImplementedError as error:
        command = _prepare_command(builder.info.full_name, "NEW_DIR")
        raise ValueError(f"dataset: got {dataset!r}, which {builder.data_dir} holds in a format without "
                         f"random access; once, with TensorFlow installed, run: {command}") from error
    except (KeyError, ValueError) as error:
        raise ValueError(f"split: got {split!r}, allowed: {', '.join(builder.info.splits)} or a slice of one "
                         f"({' '.join(str(error).split())[:200]})") from error
    if len(examples) == 0:
        raise ValueError(f"split: got no images in {where}, allowed: at least one")
    shape = np.shape(examples[0][image_key])
    if len(shape) != 3 or shape[0] != shape[1]:
        raise ValueError(f"data: got images of shape {shape} in {where}, allowed: square [H,W,C]")
    source = TfdsSource(examples=examples, where=where, image_key=image_key, label_key=label_key,
                        num_classes=0 if label_dim == 0 else num_classes or 0, size=shape[0],
                        channels=shape[2], resolution=sources.check_padding(pad_to, shape[0]))
    sources.check_source(source, where, resolution=resolution, channels=channels, label_dim=label_dim)
    return sources.cache(source, cache_bytes)
