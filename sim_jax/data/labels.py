"""Class labels without images: all that a data-free run draws instead of data.

Each scheme is a pure function of per-sample keys and global sample indices, so labels do not depend on how a
batch is split over devices, and a resumed run draws the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sim_jax.types import Array, Cond, Key

SCHEMES = ("uniform", "balanced", "histogram", "none")


def _log_weights(histogram: Sequence[float] | None, label_dim: int) -> np.ndarray:
    """The logarithm of the class weights, float32 [label_dim]."""
    try:
        weights = np.asarray(histogram, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"histogram: got {histogram!r}, allowed: {label_dim} weights") from error
    if weights.shape != (label_dim,):
        raise ValueError(f"histogram: got shape {weights.shape}, "
                         f"allowed: a weight for each of the {label_dim} classes")
    if not (np.all(np.isfinite(weights)) and np.all(weights >= 0) and weights.sum() > 0):
        raise ValueError(f"histogram: got {weights.tolist()}, allowed: weights >= 0 with a positive sum")
    with np.errstate(divide="ignore"):
        return np.log(weights / weights.sum()).astype(np.float32)


def make(scheme: str, label_dim: int, *, histogram: Sequence[float] | None = None
         ) -> Callable[[Key, Array], Array]:
    """Makes `sample(keys [B], index [B]) -> int32 [B]`, one class in [0, label_dim) per sample.

    Args:
      scheme: "uniform" draws each class alike; "balanced" takes index mod label_dim; "histogram" draws class
        c with probability proportional to histogram[c]; "none" is for unconditional networks.
      label_dim: number of classes; 0 (unconditional) gives zeros under every scheme, nothing to draw.
      histogram: class weights or counts, for "histogram" only.

    Raises:
      ValueError: unknown scheme, a bad histogram, or "none" where the network has classes.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"labels: got {scheme!r}, allowed: {', '.join(SCHEMES)}")
    if label_dim < 0:
        raise ValueError(f"label_dim: got {label_dim}, allowed: 0 and above")
    if scheme != "histogram" and histogram is not None:
        raise ValueError(f"histogram: got class weights, allowed: with labels='histogram', not {scheme!r}")
    if label_dim == 0:
        return lambda keys, index: jnp.zeros(index.shape, jnp.int32)
    if scheme == "none":
        raise ValueError(f"labels: got none for {label_dim} classes, allowed: uniform, balanced, histogram")
    if scheme == "balanced":
        return lambda keys, index: (index % label_dim).astype(jnp.int32)
    if scheme == "uniform":
        draw = jax.vmap(lambda key: jax.random.randint(key, (), 0, label_dim, jnp.int32))
        return lambda keys, index: draw(keys)
    logits = _log_weights(histogram, label_dim)
    draw = jax.vmap(lambda key: jax.random.categorical(key, logits))
    return lambda keys, index: draw(keys).astype(jnp.int32)


def one_hot(labels: Array, label_dim: int) -> Array | None:
    """One-hot float32 [B, label_dim] of int labels [B]; None for unconditional networks (label_dim = 0)."""
    return jax.nn.one_hot(labels, label_dim, dtype=jnp.float32) if label_dim else None


def condition(rows: Mapping[str, Array], label_dim: int) -> Cond:
    """What samples are conditioned on: "class" int [B] as one-hot labels and, where `rows` has captions, "text" [B,L,D] under "text_mask" [B,L]."""
    return Cond(class_labels=one_hot(rows["class"], label_dim), text=rows.get("text"), text_mask=rows.get("text_mask"))


def check_labels(labels: Sequence[int] | np.ndarray, label_dim: int) -> np.ndarray:
    """Labels from outside as int32 [n]; ValueError unless all are whole numbers in [0, label_dim)."""
    labels = np.asarray(labels)
    if labels.ndim != 1 or not (labels.dtype.kind in "iu" or labels.size == 0):
        raise ValueError(f"classes: got {labels.dtype} {labels.shape}, allowed: a list of whole numbers")
    if label_dim == 0 and labels.size:
        raise ValueError(f"classes: got {labels[0]}, allowed: none, as the network is unconditional")
    wrong = labels[(labels < 0) | (labels >= label_dim)]
    if wrong.size:
        raise ValueError(f"classes: got {wrong[0]}, allowed: 0 to {label_dim - 1}")
    return labels.astype(np.int32)


def parse_classes(text: str, label_dim: int) -> np.ndarray:
    """Reads a list such as "0,3" or "0-4,7" from the command line.

    Returns:
      int32 [n], in the order given, repeats kept.

    Raises:
      ValueError: not such a list, a range that runs backwards, or a class outside [0, label_dim).
    """
    classes: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not (first.strip().isdecimal() and (last.strip().isdecimal() if dash else True)):
            raise ValueError(f"classes: got {text!r}, allowed: classes and ranges such as 0,3 or 0-4")
        low, high = int(first), int(last if dash else first)
        if high < low:
            raise ValueError(f"classes: got the range {part.strip()!r}, allowed: low to high such as 0-4")
        check_labels([low, high], label_dim)   # before a mistyped range fills the memory
        classes.extend(range(low, high + 1))
    return check_labels(classes, label_dim)
