"""Trains the classifiers whose features measure digits.

    python -m sim_jax.evals.train_classifier --out=digits_classifier.safetensors                  1.5 minutes, two CPU cores
    python -m sim_jax.evals.train_classifier --out=mnist_classifier.safetensors \\
        --data=mnist-28x28.zip --held_out=10000 --steps=2000                                      4 minutes, one CPU core

Cross-entropy and AdamW, under small affine maps and Gaussian noise of random strength, so that the features neither hang on single
pixels nor break on a noisy sample. Of the 1,797 embedded digits the accuracy is measured first, by k-fold cross-validation: every
digit is judged once by a network that never saw it; the weights that ship are then trained in the same way on all digits, because
the features are a measuring stick and not a claim about unseen digits. A larger data set keeps `held_out` images back instead, and
the weights that ship are those measured. They are scaled so that the features' variance over the images trained on is 1 on average
(the head is divided by as much), and stored as float16 with command, seed, accuracies and versions in the metadata.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from jax.scipy.ndimage import map_coordinates
from safetensors.numpy import save

from sim_jax.data import digits
from sim_jax.data.images import open_images
from sim_jax.data.source import ArraySource, in_memory
from sim_jax.evals.quality import images_hash
from sim_jax.files import write_atomically
from sim_jax.models.classifier import DigitsClassifier
from sim_jax.progress import ProgressBar
from sim_jax.types import Array, Key, Params

_ENOUGH = 5000   # images that go through the network at a time, and that give the features' scale


def augment(key: Key, images: Array, *, shift: float = 1.0, shear: float = 0.15,
            noise: float = 0.25) -> Array:
    """Images [B,H,W,C] in [-1, 1] under random affine maps about their centres, plus noise.

    Shifts are uniform within `shift` pixels, the map's four coefficients within `shear` of the identity's;
    bilinear, -1 outside. The noise's standard deviation is uniform below `noise`, one for each image.
    """
    count, height, width, _ = images.shape
    key_map, key_shift, key_noise, key_std = jax.random.split(key, 4)
    maps = jnp.eye(2)[None] + jax.random.uniform(key_map, (count, 2, 2), minval=-shear, maxval=shear)
    shifts = jax.random.uniform(key_shift, (count, 2), minval=-shift, maxval=shift)
    centre = (np.array([height, width], np.float32) - 1.0) / 2.0
    grid = np.stack(np.mgrid[:height, :width], axis=-1) - centre[None, None, :]
    places = jnp.einsum("bij,hwj->bihw", maps, grid) + shifts[:, :, None, None] + centre[None, :, None, None]
    interpolate = functools.partial(map_coordinates, order=1, mode="constant", cval=-1.0)
    move = jax.vmap(lambda channel, place: interpolate(channel, [place[0], place[1]]), (2, None), 2)
    moved = jax.vmap(move)(images, places)
    std = jax.random.uniform(key_std, (count, 1, 1, 1), maxval=noise)
    return moved + jnp.broadcast_to(std, moved.shape) * jax.random.normal(key_noise, moved.shape)


@functools.partial(jax.jit, static_argnums=(0, 1))
def train_step(model: DigitsClassifier, optimizer: optax.GradientTransformation, params: Params,
               opt_state: optax.OptState, key: Key, images: Array,
               labels: Array) -> tuple[Params, optax.OptState, Array]:
    """One step on images [B,H,W,C] and labels [B] -> (params, opt_state, mean cross-entropy)."""

    def loss_fn(params: Params) -> Array:
        _, logits = model.apply({"params": params}, augment(key, images))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, gradients = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


def train(model: DigitsClassifier, optimizer: optax.GradientTransformation, images: np.ndarray,
          labels: np.ndarray, *, steps: int, batch_size: int, seed: int,
          on_step: Callable[[float], None]) -> Params:
    """Parameters after `steps` steps on images [N,H,W,C] in [-1, 1], labels [N], drawn with replacement."""
    key = jax.random.key(seed)
    params = model.init(jax.random.fold_in(key, steps), images[:1])["params"]
    opt_state = optimizer.init(params)
    generator = np.random.default_rng(seed)
    for step in range(steps):
        index = generator.integers(len(images), size=batch_size)
        params, opt_state, loss = train_step(model, optimizer, params, opt_state,
                                             jax.random.fold_in(key, step), images[index], labels[index])
        on_step(float(loss))
    return params


def accuracy(model: DigitsClassifier, params: Params, images: np.ndarray, labels: np.ndarray) -> float:
    """Share of images [N,H,W,C] in [-1, 1] whose largest logit is the label's [N]."""
    predict = jax.jit(lambda part: model.apply({"params": params}, part)[1].argmax(axis=1))
    parts = [np.asarray(predict(images[start:start + _ENOUGH])) for start in range(0, len(images), _ENOUGH)]
    return float((np.concatenate(parts) == labels).mean()) if parts else 0.0


def scale_features(model: DigitsClassifier, params: Params, images: np.ndarray) -> Params:
    """Parameters with the same logits and features of variance 1 over `images`, on average over features."""
    features, _ = model.apply({"params": params}, images)
    scale = float(1.0 / np.sqrt(np.var(np.asarray(features), axis=0).mean()))
    return params | {"features": jax.tree.map(lambda p: p * scale, params["features"]),
                     "logits": params["logits"] | {"kernel": params["logits"]["kernel"] / scale}}


def fit(images: np.ndarray, labels: np.ndarray, *, steps: int, batch_size: int, learning_rate: float, weight_decay: float, seed: int,
        folds: int | None = None, held_out: int | None = None) -> tuple[Params, dict[str, float]]:
    """Measures an accuracy and trains (module docstring).

    Args:
      images, labels: uint8 [N,H,W,C], int [N].
      folds: cross-validates, then trains on everything; or
      held_out: trains once, on all but so many images.
    Returns: (float16 params, {name: accuracy}).
    """
    images = images.astype(np.float32) / 127.5 - 1.0
    model = DigitsClassifier()
    optimizer = optax.adamw(optax.cosine_decay_schedule(learning_rate, steps), weight_decay=weight_decay)
    order = np.random.default_rng(seed).permutation(len(images))
    parts = [order[fold::folds] for fold in range(folds)] + [order[:0]] if held_out is None else [order[:held_out]]
    correct, done = 0.0, 0
    with ProgressBar(len(parts) * steps, description="classifier", figures=("loss",)) as progress:

        def on_step(loss: float) -> None:
            nonlocal done
            done += 1
            progress.update(done, {"loss": loss})

        for unseen in map(np.sort, parts):
            seen = np.setdiff1d(order, unseen)
            params = train(model, optimizer, images[seen], labels[seen], steps=steps, batch_size=batch_size, seed=seed, on_step=on_step)
            if held_out is not None:
                params = _round(scale_features(model, params, images[seen[:_ENOUGH]]))
            correct += accuracy(model, params, images[unseen], labels[unseen]) * len(unseen)
    if held_out is None:
        params = _round(scale_features(model, params, images))
    accuracies = {"held_out_accuracy": correct / sum(map(len, parts)), "accuracy": accuracy(model, params, images, labels)}
    return jax.tree.map(np.float16, params), accuracies


def _round(params: Params) -> Params:
    """What float16 keeps of them, as float32."""
    return jax.tree.map(lambda p: np.asarray(p, np.float16).astype(np.float32), params)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; raises ValueError on a number out of range."""
    parser = argparse.ArgumentParser(prog="python -m sim_jax.evals.train_classifier",
                                     description="Train a classifier whose features measure digits.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, default=argparse.SUPPRESS,
                        help="safetensors file to write; the package reads sim_jax/assets/NAME_classifier.safetensors")
    parser.add_argument("--data", default="digits", help="digits, or a .zip or folder in EDM's layout, with labels")
    parser.add_argument("--steps", type=int, default=1500, help="steps of each training")
    parser.add_argument("--batch_size", type=int, default=128, help="images a step")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="at the start, then cosine to 0")
    parser.add_argument("--weight_decay", type=float, default=1e-3, help="AdamW's")
    parser.add_argument("--folds", type=int, help="of the cross-validation (5 where nothing is held out)")
    parser.add_argument("--held_out", type=int, help="images to judge by and not train on, instead of the cross-validation")
    parser.add_argument("--seed", type=int, default=0, help="of order, initialisation and augmentation")
    args = parser.parse_args(argv)
    if args.held_out is None:
        args.folds = 5 if args.folds is None else args.folds
    elif args.folds is not None:
        raise ValueError("folds: allowed without held_out only")
    least = {"steps": 1, "batch_size": 1, "learning_rate": 0, "weight_decay": 0, "folds": 2, "held_out": 1, "seed": 0}
    for name, minimum in least.items():
        value = getattr(args, name)
        if value is not None and not value >= minimum:
            raise ValueError(f"{name}: got {value}, allowed: {minimum} or more")
    return args


def _open(args: argparse.Namespace) -> ArraySource:
    source = digits.load() if args.data == "digits" else in_memory(open_images(args.data, channels=1))
    if source.num_classes != DigitsClassifier.num_classes:
        raise ValueError(f"data: got {source.num_classes} classes, allowed: {DigitsClassifier.num_classes}")
    if args.held_out is not None and not args.held_out < len(source):
        raise ValueError(f"held_out: got {args.held_out}, allowed: fewer than the {len(source)} images")
    return source


def main(argv: list[str] | None = None) -> int:
    """Trains and writes; returns the exit code, 2 on bad input."""
    try:
        args = parse_args(argv)
        source = _open(args)
        settings = {name: value for name, value in vars(args).items() if name not in ("out", "data") and value is not None}
        params, accuracies = fit(source.images, source.labels, **settings)
        # Where the data lie is nobody's business: the file's name, and its content by the hash.
        flags = {**({} if args.data == "digits" else {"data": Path(args.data).name}), **settings}
        note = {
            "command": "python -m sim_jax.evals.train_classifier " + " ".join(f"--{name}={value}" for name, value in flags.items()),
            "versions": " ".join(f"{name}=={metadata.version(name)}" for name in ("jax", "flax", "optax", "numpy")),
            "images": str(len(source)),
            "data": images_hash(source.images, source.labels),
            "image_shape": json.dumps(source.images.shape[1:]),
            **{name: str(value) for name, value in settings.items()},
            **{name: f"{value:.4f}" for name, value in accuracies.items()},
        }
        content = save(traverse_util.flatten_dict(params, sep="."), metadata=note)
        write_atomically(args.out, lambda file: file.write(content))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    how = f"{args.folds} folds" if args.held_out is None else f"{args.held_out} images"
    print(f"held-out accuracy {accuracies['held_out_accuracy']:.2%} ({how}); the weights written"
          f" have {accuracies['accuracy']:.2%} on all {len(source)} images: {args.out}, {len(content)} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
