"""The features that distances are measured in, opened by name or by the directory of a converted network.

    digits   8x8 grey: penultimate layer (64) of the classifier in the package that knows the embedded digits
    mnist    28x28 grey, nothing else (images padded to 32x32 are to be cropped): the same network, trained on MNIST
    DIR      a converted Inception-v3: `sim_jax.evals.inception.open_inception(DIR, layout=...)`
    a.b:c    any other network: `c(layout=...)` of your module a.b, which gives a FeatureExtractor

An extractor carries an identifier made of its name and the hash of its weights, which every figure quotes: two figures are comparable
only where their identifiers agree. Images go through one compiled batch shape (the last batch is padded), in float32 at the highest
matmul precision, so that a feature does not depend on how many images it came with. With a mesh the batch is cut over its devices,
each of which works on the same number of images whatever their number.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open

from sim_jax import sharding
from sim_jax.models.classifier import DigitsClassifier
from sim_jax.sharding import Layout
from sim_jax.types import Array, Params

_ASSETS = Path(__file__).resolve().parent.parent / "assets"
DIGITS_CLASSIFIER, MNIST_CLASSIFIER = _ASSETS / "digits_classifier.safetensors", _ASSETS / "mnist_classifier.safetensors"
NAMES = ("digits", "mnist")
_BATCH, _INCEPTION_BATCH = 256, 32   # images on each device


@dataclass(frozen=True, kw_only=True)
class FeatureExtractor:
    """A function from images to features, and what to call it in a report.

    Attributes:
      extract: images uint8 [N,H,W,C] -> one float32 array [N,...] for each name in `outputs`.
      identifier: "name:hash of the weights".
      image_shape: (H, W, C), the only one taken; a None among them takes any.
      outputs: at least "features" [N,F], which distances are taken in. "probabilities" [N,K] are for class agreement and the
        Inception score, "spatial" [N,S] are sFID's.
      batch: how many images it likes to get at a time: what its programs take, over all devices.
      labelled: whether the K classes are those of the data, so that they can be compared with labels.
    """

    extract: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    identifier: str
    image_shape: tuple[int | None, int | None, int | None]
    outputs: tuple[str, ...] = ("features", "probabilities")
    batch: int = 256
    labelled: bool = False

    def all(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """{name of an output: array}; raises ValueError on images of another type or size, or none at all."""
        images = np.asarray(images)
        self.check(images.shape, images.dtype)
        return dict(zip(self.outputs, self.extract(images), strict=True))

    def check(self, shape: tuple[int, ...], dtype: np.dtype | str = "uint8") -> None:
        """Raises ValueError where images of such a shape (N, H, W, C) and type are not taken."""
        fits = len(shape) == 4 and all(want in (None, got) for want, got in zip(self.image_shape, shape[1:]))
        if np.dtype(dtype) != np.uint8 or not fits or not shape[0]:
            taken = ",".join(letter if size is None else str(size) for letter, size in zip("HWC", self.image_shape))
            got = "x".join(map(str, shape[1:])) if len(shape) == 4 and shape[0] else list(shape)
            raise ValueError(f"images: got {dtype} {got}, allowed: uint8 [N,{taken}], N >= 1, for features {self.identifier}")

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(features [N,F], probabilities [N,K]) of an extractor that has both."""
        out = self.all(images)
        return out["features"], out["probabilities"]


def open_features(name: str | Path, *, layout: Layout = Layout(), convention: str | None = None) -> FeatureExtractor:
    """The extractor called `name`, that of the converted network in the directory `name`, or a module's own (module docstring).

    `convention` says which tool's resize an Inception network gets (inception.CONVENTIONS; None is EDM's).
    Raises: ValueError for an unknown name, and for weights that are missing, damaged or of another network.
    """
    if name in NAMES:
        if convention is not None:
            raise ValueError(f"convention: got {convention!r}, allowed for Inception networks only, {name} takes images as they are")
        return {"digits": digits_features, "mnist": mnist_features}[str(name)](layout=layout)
    if ":" in str(name) and not Path(name).exists() and convention is None:
        return _own_features(str(name), layout)
    if not Path(name).is_dir():
        raise ValueError(f"features: got {str(name)!r}, allowed: {', '.join(NAMES)}, the directory of a converted Inception network, or "
                         "module:function")
    from sim_jax.evals import inception  # which imports this module

    size = _INCEPTION_BATCH * _devices(layout)
    extractor = inception.open_inception(name, layout=layout, convention=convention or "edm", batch_per_device=_INCEPTION_BATCH)
    return dataclasses.replace(extractor, batch=size)


def _own_features(name: str, layout: Layout) -> FeatureExtractor:
    module, _, function = name.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"features: got {name!r} ({error}), allowed: module:function of a module that Python finds") from None
    extractor = make(layout=layout)
    if not isinstance(extractor, FeatureExtractor):
        raise ValueError(f"features: got {type(extractor).__name__} from {name}, allowed: sim_jax.evals.features.FeatureExtractor")
    return extractor


def digits_features(path: str | Path = DIGITS_CLASSIFIER, *, layout: Layout = Layout()) -> FeatureExtractor:
    """The 64 features and 10 class probabilities of 8x8 grey digits, from the weights at `path`.

    Raises ValueError where the file is missing, damaged or of another network.
    """
    return _classifier_features("digits_classifier", path, (8, 8, 1), layout)


def mnist_features(path: str | Path = MNIST_CLASSIFIER, *, layout: Layout = Layout()) -> FeatureExtractor:
    """The same of 28x28 grey digits: MNIST as it is, not padded to 32x32."""
    return _classifier_features("mnist_classifier", path, (28, 28, 1), layout)


def _classifier_features(name: str, path: str | Path, image_shape: tuple[int, int, int], layout: Layout) -> FeatureExtractor:
    params, _ = load_classifier(path)
    model = DigitsClassifier()
    want = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *image_shape), np.float32))
    flat, flat_want = (traverse_util.flatten_dict(tree, sep=".") for tree in (params, want["params"]))
    if {k: v.shape for k, v in flat.items()} != {k: v.shape for k, v in flat_want.items()}:
        raise ValueError(f"classifier: got {path} with {len(flat)} tensors, allowed: the {len(flat_want)} of "
                         f"DigitsClassifier for {image_shape} images")

    def apply(images: Array) -> tuple[Array, Array]:
        features, logits = model.apply({"params": params}, images)
        return features, jax.nn.softmax(logits)

    return FeatureExtractor(extract=batched(apply, layout=layout), identifier=f"{name}:{weights_hash(flat)}", image_shape=image_shape,
                            batch=_BATCH * _devices(layout), labelled=True)


def _devices(layout: Layout) -> int:
    return 1 if layout.mesh is None else layout.mesh.size


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


def batched(apply: Callable[[Array], tuple[Array, ...]], *, batch: int = _BATCH, layout: Layout = Layout()) -> Callable:
    """`apply`, of [B,H,W,C] float32 in [-1, 1], jitted once, as a function of uint8 [N,H,W,C], N >= 1; B is `batch` on every device."""
    size = batch * _devices(layout)
    jitted = jax.jit(lambda images: layout.split(apply(layout.split(images).astype(np.float32) / 127.5 - 1.0)))

    def extract(images: np.ndarray) -> tuple[np.ndarray, ...]:
        outputs = []
        for start in range(0, len(images), size):
            chunk = images[start:start + size]
            padding = [(0, size - len(chunk))] + [(0, 0)] * (chunk.ndim - 1)
            with jax.default_matmul_precision("highest"):
                arrays = jitted(np.pad(chunk, padding))
            outputs.append([sharding.to_host(array)[:len(chunk)] for array in arrays])
        return tuple(np.concatenate(parts) for parts in zip(*outputs))

    return extract
