"""Trains the classifier whose features measure digits: `python -m sim_jax.evals.train_classifier --out=FILE`.

Cross-entropy and AdamW on the 1,797 digits, under small affine maps and Gaussian noise of random strength, so
that the features neither hang on single pixels nor break on a noisy sample. The accuracy is measured first,
by k-fold cross-validation: every digit is judged once by a network that never saw it. The weights that ship
are then trained in the same way on all digits, because the features are a measuring stick and not a claim
about unseen digits. They are scaled so that the features' variance over the digits is 1 on average (the head
is divided by as much), and stored as float16 with command, seed, accuracies and versions in the metadata. A
minute and a half on two CPU cores.
"""

from __future__ import annotations

import argparse
import functools
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
from sim_jax.evals.features import DIGITS_CLASSIFIER
from sim_jax.files import write_atomically
from sim_jax.models.classifier import DigitsClassifier
from sim_jax.progress import ProgressBar
from sim_jax.types import Array, Key, Params


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
    _, logits = model.apply({"params": params}, images)
    return float((np.asarray(logits).argmax(axis=1) == labels).mean())


def scale_features(model: DigitsClassifier, params: Params, images: np.ndarray) -> Params:
    """Parameters with the same logits and features of variance 1 over `images`, on average over features."""
    features, _ = model.apply({"params": params}, images)
    scale = float(1.0 / np.sqrt(np.var(np.asarray(features), axis=0).mean()))
    return params | {"features": jax.tree.map(lambda p: p * scale, params["features"]),
                     "logits": params["logits"] | {"kernel": params["logits"]["kernel"] / scale}}


def fit(images: np.ndarray, labels: np.ndarray, *, steps: int, batch_size: int, learning_rate: float,
        weight_decay: float, folds: int, seed: int) -> tuple[Params, dict[str, float]]:
    """Cross-validates, then trains on all images, uint8 [N,H,W,C] -> (float16 params, {name: accuracy})."""
    images = images.astype(np.float32) / 127.5 - 1.0
    model = DigitsClassifier()
    optimizer = optax.adamw(optax.cosine_decay_schedule(learning_rate, steps), weight_decay=weight_decay)
    order = np.random.default_rng(seed).permutation(len(images))
    correct, done = 0.0, 0
    with ProgressBar((folds + 1) * steps, description="classifier", figures=("loss",)) as progress:

        def on_step(loss: float) -> None:
            nonlocal done
            done += 1
            progress.update(done, {"loss": loss})

        run = functools.partial(train, model, optimizer, steps=steps, batch_size=batch_size, seed=seed,
                                on_step=on_step)
        for fold in range(folds):
            held_out = np.sort(order[fold::folds])
            rest = np.setdiff1d(order, held_out)
            params = run(images[rest], labels[rest])
            correct += accuracy(model, params, images[held_out], labels[held_out]) * len(held_out)
        params = scale_features(model, run(images, labels), images)
    params = jax.tree.map(lambda p: np.asarray(p, np.float16), params)
    return params, {"held_out_accuracy": correct / len(images),
                    "accuracy": accuracy(model, jax.tree.map(np.float32, params), images, labels)}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; raises ValueError on a number out of range."""
    parser = argparse.ArgumentParser(prog="python -m sim_jax.evals.train_classifier",
                                     description="Train the classifier whose features measure digits.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, default=argparse.SUPPRESS,
                        help="safetensors file to write; the package reads "
                        f"sim_jax/assets/{DIGITS_CLASSIFIER.name}")
    parser.add_argument("--steps", type=int, default=1500, help="steps of each of the folds + 1 trainings")
    parser.add_argument("--batch_size", type=int, default=128, help="images a step")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="at the start, then cosine to 0")
    parser.add_argument("--weight_decay", type=float, default=1e-3, help="AdamW's")
    parser.add_argument("--folds", type=int, default=5, help="folds of the cross-validation")
    parser.add_argument("--seed", type=int, default=0, help="of order, initialisation and augmentation")
    args = parser.parse_args(argv)
    least = {"steps": 1, "batch_size": 1, "learning_rate": 0, "weight_decay": 0, "folds": 2, "seed": 0}
    for name, minimum in least.items():
        if not getattr(args, name) >= minimum:
            raise ValueError(f"{name}: got {getattr(args, name)}, allowed: {minimum} or more")
    return args


def main(argv: list[str] | None = None) -> int:
    """Trains and writes; returns the exit code, 2 on bad input."""
    try:
        args = parse_args(argv)
        settings = {name: value for name, value in vars(args).items() if name != "out"}
        source = digits.load()
        params, accuracies = fit(source.images, source.labels, **settings)
        flags = " ".join(f"--{name}={value}" for name, value in settings.items())
        note = {
            "command": f"python -m sim_jax.evals.train_classifier {flags}",
            "versions": " ".join(f"{name}=={metadata.version(name)}"
                                 for name in ("jax", "flax", "optax", "numpy")),
            "digits": str(len(source)),
            **{name: str(value) for name, value in settings.items()},
            **{name: f"{value:.4f}" for name, value in accuracies.items()},
        }
        content = save(traverse_util.flatten_dict(params, sep="."), metadata=note)
        write_atomically(args.out, lambda file: file.write(content))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"held-out accuracy {accuracies['held_out_accuracy']:.2%} ({args.folds} folds); the weights written"
          f" have {accuracies['accuracy']:.2%} on all {len(source)} digits: {args.out}, {len(content)} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
