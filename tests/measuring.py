"""Feature extractors small enough for tests, whose features are known."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from sim_jax import sharding
from sim_jax.evals import features as features_lib
from sim_jax.evals.features import FeatureExtractor


def pixel_features(shape=(4, 4, 1), *, classes: int = 4) -> FeatureExtractor:
    """Features are the pixels, the class is that of the first pixel, and spatial features are the first three pixels."""
    def extract(images):
        flat = images.reshape(len(images), -1).astype(np.float32) / 255
        return flat, np.eye(classes, dtype=np.float32)[images[:, 0, 0, 0].astype(int) * classes // 256], flat[:, :3]

    return FeatureExtractor(identifier="pixels:0", image_shape=shape, extract=extract, labelled=True,
                            outputs=("features", "probabilities", "spatial"))


def random_network(shape=(32, 32, 3), *, width: int = 24, batch: int = 64, devices: int | None = None) -> FeatureExtractor:
    """An untrained convolutional network on some devices, with `batch` images on each."""
    keys = jax.random.split(jax.random.key(0), 3)
    kernels = [jax.random.normal(key, (3, 3, n, width)) / (9 * n) ** 0.5 for key, n in zip(keys, (shape[2], width, width))]

    def apply(x):
        for kernel in kernels:
            x = jax.nn.silu(jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")))
        pooled = jnp.mean(x, (1, 2))
        return pooled, jax.nn.softmax(10 * pooled), x.reshape(len(x), -1)[:, :40]

    layout = sharding.Layout() if devices is None else sharding.Layout(sharding.make_mesh(devices=jax.devices()[:devices]))
    return FeatureExtractor(identifier="random:0", image_shape=shape, extract=features_lib.batched(apply, batch=batch, layout=layout),
                            outputs=("features", "probabilities", "spatial"))
