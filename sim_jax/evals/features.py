"""The features that distances are measured in: the penultimate layer of the digits classifier in the package.

An extractor carries an identifier made of its name and the hash of its weights, which every figure quotes:
two figures are comparable only where their identifiers agree. Images go through one compiled batch shape (the
last batch is padded), in float32 at the highest matmul precision, so that a feature does not depend on how
many images it came with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open

from sim_jax.models.classifier import DigitsClassifier
from sim_jax.types import Array, Params

DIGITS_CLASSIFIER = Path(__file__).resolve().parent.parent / "assets" / "digits_classifier.safetensors"


@dataclass(frozen=True, kw_only=True)
class FeatureExtractor:
    """A function from images to features, and what to call it in a report.

    Attributes:
      extract: images uint8 [N,H,W,C] -> (features [N,F] float32, probabilities [N,K] float32).
      identifier: "name:hash of the weights".
      image_shape: (H, W, C), the only one taken.
    """

    extract: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    identifier: str
    image_shape: tuple[int, int, int]

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`extract`; raises ValueError on images of another type or size, or none at all."""
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.shape[1:] != self.image_shape or not len(images):
            height, width, channels = self.image_shape
            raise ValueError(f"images: got {images.dtype} {images.shape}, allowed: uint8 "
                             f"[N,{height},{width},{channels}], N >= 1, for features {self.identifier}")
        return self.extract(images)


def digits_features(path: str | Path = DIGITS_CLASSIFIER) -> FeatureExtractor:
    """The 64 features and 10 class probabilities of 8x8 grey digits, from the weights at `path`.

    Raises ValueError where the file is missing, damaged or of another network.
    """
    params, _ = load_classifier(path)
    model, image_shape = DigitsClassifier(), (8, 8, 1)
    want = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *image_shape), np.float32))
    flat, flat_want = (traverse_util.flatten_dict(tree, sep=".") for tree in (params, want["params"]))
    if {k: v.shape for k, v in flat.items()} != {k: v.shape for k, v in flat_want.items()}:
        raise ValueError(f"classifier: got {path} with {len(flat)} tensors, allowed: the {len(flat_want)} of "
                         f"DigitsClassifier for {image_shape} images")

    def apply(images: Array) -> tuple[Array, Array]:
        features, logits = model.apply({"params": params}, images)
        return features, jax.nn.softmax(logits)

    return FeatureExtractor(extract=batched(apply), identifier=f"digits_classifier:{weights_hash(flat)}",
                            image_shape=image_shape)


def load_classifier(path: str | Path = DIGITS_CLASSIFIER) -> tuple[Params, dict[str, str]]:
    """(params: nested dicts of float32, metadata: command, seed, accuracies, versions) of a classifier file.

    Raises ValueError where the file is missing or damaged.
    """
    try:
        with safe_open(str(path), framework="numpy") as file:
            flat = {name: file.get_tensor(name).astype(np.float32) for name in file.keys()}
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"classifier: got {path} ({error}), allowed: a file that "
                         "sim_jax.evals.train_classifier wrote") from None
    return traverse_util.unflatten_dict(flat, sep="."), metadata


def weights_hash(flat: Mapping[str, np.ndarray]) -> str:
    """The first 12 hex digits of the SHA-256 of named arrays as float32, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(flat):
        digest.update(f"{name} {flat[name].shape} ".encode() + np.asarray(flat[name], "<f4").tobytes())
    return digest.hexdigest()[:12]


def batched(apply: Callable[[Array], tuple[Array, ...]], *, batch: int = 256) -> Callable:
    """`apply`, of [batch,H,W,C] float32 in [-1, 1], jitted once, as a function of uint8 [N,H,W,C], N >= 1."""
    jitted = jax.jit(lambda images: apply(images.astype(np.float32) / 127.5 - 1.0))

    def extract(images: np.ndarray) -> tuple[np.ndarray, ...]:
        outputs = []
        for start in range(0, len(images), batch):
            chunk = images[start:start + batch]
            padding = [(0, batch - len(chunk))] + [(0, 0)] * (chunk.ndim - 1)
            with jax.default_matmul_precision("highest"):
                arrays = jitted(np.pad(chunk, padding))
            outputs.append([np.asarray(array)[:len(chunk)] for array in arrays])
        return tuple(np.concatenate(parts) for parts in zip(*outputs))

    return extract
