"""Reads a scene's attributes back from its pixels, and counts how often they are those of the caption.

    1  every pixel gets the nearest colour of the palette or of the background
    2  connected pixels of one colour (sharing a side) are an object, unless there are fewer than SPECK of them
    3  an object's shape and place are those of the drawn shape, at all places, that it overlaps best (intersection over union); below
       MATCH it has no shape, which agrees with no caption

A clean drawing is read without error: its objects are at least a pixel apart, and each is its own best template (union 1). Attributes:

    count     as many objects as the caption names
    colour    the objects' colours are the caption's, as multisets
    shape     the objects' shapes, likewise
    relation  among captions with one: some object of the first kind stands to one of the second kind as said
    all       the objects' (colour, shape) are the caption's, and the relation holds
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.ndimage

from sim_jax.data import scene_captions, scenes
from sim_jax.data.scene_captions import COLOURS, RELATIONS, SHAPES, Caption

SPECK = 4      # pixels; smaller specks are no objects
MATCH = 0.8    # overlap from which an object has a shape
ATTRIBUTES = ("count", "colour", "shape", "relation", "all")


class Object(NamedTuple):
    """colour; shape, None where no template fits; x, y: left and top of the best template's box; overlap: with it, 0 to 1."""

    colour: str
    shape: str | None
    x: int
    y: int
    overlap: float


@functools.cache
def _templates() -> tuple[np.ndarray, list[tuple[str, int, int]]]:
    """Every shape at every place: pixels [T,256] float32, and (shape, x, y) of each."""
    places = range(scenes.RESOLUTION - scenes.SIZE + 1)
    names = [(shape, x, y) for shape in SHAPES for y in places for x in places]
    pixels = np.zeros((len(names), scenes.RESOLUTION, scenes.RESOLUTION), np.float32)
    for canvas, (shape, x, y) in zip(pixels, names):
        canvas[y:y + scenes.SIZE, x:x + scenes.SIZE] = scenes.template(shape)
    return pixels.reshape(len(names), -1), names


def colours(images: np.ndarray) -> np.ndarray:
    """The nearest of background (0) and COLOURS (from 1) at every pixel: uint8 [N,H,W,3] -> int [N,H,W]."""
    palette = np.array([scenes.GROUND, *COLOURS.values()], np.float32)
    # |p - c|^2 without |p|^2, which is the same for all
    return np.argmin(np.sum(palette**2, 1) - 2 * images.astype(np.float32) @ palette.T, -1)


def _components(images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(image [K], colour's number [K], pixels [K,256] float32) of all objects of all images."""
    classes = colours(images)
    flat = np.zeros((3, 3, 3), bool)
    flat[1] = scipy.ndimage.generate_binary_structure(2, 1)
    found = []
    for number in range(1, len(COLOURS) + 1):
        labels, count = scipy.ndimage.label(classes == number, structure=flat)
        at, (n, y, x) = labels[labels > 0] - 1, np.nonzero(labels)
        masks = np.zeros((count, scenes.RESOLUTION**2), np.float32)
        masks[at, y * scenes.RESOLUTION + x] = 1
        where = np.zeros(count, np.int64)
        where[at] = n
        found.append((where, np.full(count, number), masks))
    image, colour, masks = (np.concatenate(parts) for parts in zip(*found))
    keep = masks.sum(1) >= SPECK
    return image[keep], colour[keep], masks[keep]


def read(images: np.ndarray) -> list[list[Object]]:
    """The objects of each image, uint8 [N,16,16,3]. Raises ValueError for images of another kind."""
    expected = (scenes.RESOLUTION, scenes.RESOLUTION, 3)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != expected:
        raise ValueError(f"images: got {images.dtype} {images.shape}, allowed: uint8 [N,{','.join(map(str, expected))}]")
    out: list[list[Object]] = [[] for _ in images]
    if not len(images):
        return out
    image, colour, masks = _components(images)
    templates, names = _templates()
    shared = masks @ templates.T
    overlaps = shared / (masks.sum(1)[:, None] + templates.sum(1)[None] - shared)
    best = overlaps.argmax(1)
    for k, (n, number) in enumerate(zip(image, colour)):
        (shape, x, y), overlap = names[best[k]], float(overlaps[k, best[k]])
        out[n].append(Object(list(COLOURS)[number - 1], shape if overlap >= MATCH else None, x, y, overlap))
    return out


def _related(found: Sequence[Object], caption: Caption) -> bool:
    kinds = [[o for o in found if (o.colour, o.shape) == kind] for kind in caption.objects]
    pairs = [(a, b) for a in kinds[0] for b in kinds[1]]
    if not pairs:
        return False
    x, y = (np.array([getattr(b, axis) - getattr(a, axis) for a, b in pairs]) for axis in ("x", "y"))
    return bool(scenes.stands(np.full(len(pairs), RELATIONS.index(caption.relation)), x, y).any())


def judge(found: Sequence[Object], caption: Caption) -> dict[str, bool]:
    """Which of ATTRIBUTES a scene has as its caption says; "relation" only where the caption has one."""
    def same(a, b) -> bool:
        return collections.Counter(a) == collections.Counter(b)

    out = {"count": len(found) == len(caption.objects), "colour": same((o.colour for o in found), (c for c, _ in caption.objects)),
           "shape": same((o.shape for o in found), (s for _, s in caption.objects))}
    kinds = same(((o.colour, o.shape) for o in found), caption.objects)
    if caption.relation is not None:
        out["relation"] = _related(found, caption)
    return out | {"all": kinds and out.get("relation", True)}


def adherence(images: np.ndarray, prompts: Sequence[str]) -> dict[str, float]:
    """The share of images that agree with their captions, attribute by attribute.

    Args:
      images: uint8 [N,16,16,3].
      prompts: N captions of the scenes' grammar.
    Returns: {attribute: share}, without "relation" where no caption has one.
    Raises: ValueError for other images, other captions, or another number of them.
    """
    if len(prompts) != len(images) or not len(images):
        raise ValueError(f"prompts: got {len(prompts)} for {len(images)} images, allowed: one for each of one image or more")
    parsed = [scene_captions.parse(prompt) for prompt in prompts]
    verdicts = [judge(found, caption) for found, caption in zip(read(images), parsed)]
    return {name: float(np.mean([v[name] for v in verdicts if name in v])) for name in ATTRIBUTES if any(name in v for v in verdicts)}
