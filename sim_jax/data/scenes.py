"""Drawn scenes: coloured shapes on grey, 16 x 16 pixels, with captions of `scene_captions`; nothing is stored or downloaded.

Scene i of a seed is a function of (seed, i): its caption, then sizes and places, drawn again until they fit: shapes at least a pixel
apart (boxes around them), and where the caption says so in the relation: a is left of b where the way from a's centre to b's goes to the
right further than it goes up or down; and likewise for the others.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from sim_jax.data import scene_captions, scenes_text, source
from sim_jax.data.scene_captions import COLOURS, RELATIONS, SHAPES, Caption

RESOLUTION = 16
BACKGROUND = 128    # grey: images whose mean is far from 0 come out too bright, as it hardly shows in the loss at much noise
SIZES = (6,)        # pixels across
GRID = 2            # places are multiples of it
MOST = 3            # shapes in a scene
SCENES = 131072     # that a data set has
_ROWS = {           # widths of a shape's rows, each centred
    ("circle", 6): (2, 4, 6, 6, 4, 2), ("triangle", 6): (2, 2, 4, 4, 6, 6)}


class Scenes(NamedTuple):
    """caption: int [N] in `scene_captions.captions()`; size, x, y: int [N,3], of the box around each shape, its left and its top.

    Shapes come in the order of the caption's objects; what is beyond their number means nothing.
    """

    caption: np.ndarray
    size: np.ndarray
    x: np.ndarray
    y: np.ndarray


@functools.cache
def template(shape: str, size: int) -> np.ndarray:
    """The pixels of a shape, bool [size,size]."""
    rows = _ROWS.get((shape, size), (size,) * size)
    return np.stack([np.abs(2 * np.arange(size) - size + 1) < width for width in rows])


def displacement(size: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(dx, dy) [N], twice the way from the first shape's centre to the second's; size, x, y: [N, 2 or more]."""
    return tuple((2 * a + size)[:, 1] - (2 * a + size)[:, 0] for a in (x, y))


def stands(relation: np.ndarray, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Whether the first shape stands in `relation` (a number of RELATIONS) to the second, bool [N]."""
    along = np.stack([dx, -dx, dy, -dy])[relation, np.arange(len(dx))]
    return along > np.where(relation < 2, np.abs(dy), np.abs(dx))


@functools.cache
def _wanted() -> tuple[np.ndarray, np.ndarray]:
    """(number of shapes, relation or -1) of every caption, int [captions]."""
    captions = scene_captions.captions()
    return (np.array([len(c.objects) for c in captions]),
            np.array([-1 if c.relation is None else RELATIONS.index(c.relation) for c in captions]))


def _fits(caption: np.ndarray, size: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    count, relation = (table[caption] for table in _wanted())
    fits = np.where(relation < 0, True, stands(np.maximum(relation, 0), *displacement(size, x, y)))
    for a, b in ((0, 1), (0, 2), (1, 2)):
        apart = [(p[:, i] + size[:, i] < p[:, j]) for p in (x, y) for i, j in ((a, b), (b, a))]
        fits &= np.any(apart, axis=0) | (count <= b)
    return fits


def place(seed: int, index: np.ndarray, caption: np.ndarray) -> Scenes:
    """Scenes `index` [N] of `seed` for given captions int [N]: sizes and places that fit."""
    out = Scenes(caption, *(np.zeros((len(index), MOST), np.int64) for _ in range(3)))
    left, attempt = np.arange(len(index)), 0
    while len(left):
        def draws(field: int, limit: int) -> np.ndarray:
            purposes = (16 * (MOST * attempt + j) + field for j in range(MOST))
            return np.stack([scene_captions.below(seed, index[left], purpose, limit) for purpose in purposes], 1)

        size = np.full((len(left), MOST), SIZE)
        x, y = (GRID * draws(field, (RESOLUTION - SIZE) // GRID + 1) for field in (3, 4))
        fits = _fits(caption[left], size, x, y)
        for whole, part in zip(out[1:], (size, x, y)):
            whole[left[fits]] = part[fits]
        left, attempt = left[~fits], attempt + 1
    return out


def render(scenes: Scenes) -> np.ndarray:
    """The pixels, uint8 [N,16,16,3]."""
    largest, captions = max(SIZES), scene_captions.captions()
    canvas = np.full((len(scenes.caption), RESOLUTION + largest, RESOLUTION + largest, 3), BACKGROUND, np.uint8)
    stamps = np.zeros((len(SHAPES), len(SIZES), largest, largest), bool)
    for i, shape in enumerate(SHAPES):
        for j, size in enumerate(SIZES):
            stamps[i, j, :size, :size] = template(shape, size)
    objects = np.full((len(captions), MOST, 2), -1)
    for i, caption in enumerate(captions):
        for j, (colour, shape) in enumerate(caption.objects):
            objects[i, j] = list(COLOURS).index(colour), SHAPES.index(shape)
    palette, span = np.array(list(COLOURS.values()), np.uint8), np.arange(largest)
    for j in range(MOST):
        colour, shape = objects[scenes.caption, j].T
        n = np.flatnonzero(colour >= 0)
        rows, columns = ((a[n, j, None] + span[None]) for a in (scenes.y, scenes.x))
        at = (n[:, None, None], rows[:, :, None], columns[:, None, :])
        stamp = stamps[shape[n], np.searchsorted(SIZES, scenes.size[n, j])]
        canvas[at] = np.where(stamp[..., None], palette[colour[n]][:, None, None], canvas[at])
    return canvas[:, :RESOLUTION, :RESOLUTION]


def draw(seed: int, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scenes `index` [N] of training: (images uint8 [N,16,16,3], captions int64 [N])."""
    scenes = place(seed, index, scene_captions.draw_captions(seed, index))
    return render(scenes), scenes.caption


def draw_for(captions: list[Caption] | tuple[Caption, ...], *, seed: int, start: int = 0) -> np.ndarray:
    """One drawing of each caption, held out or not, uint8 [N,16,16,3]; drawing i is that of (seed, start + i, caption)."""
    numbers = {caption: i for i, caption in enumerate(scene_captions.captions())}
    index = np.arange(start, start + len(captions))
    return render(place(seed, index, np.array([numbers[caption] for caption in captions], np.int64)))


def load(*, max_size: int = SCENES, resolution: int | None = None, channels: int | None = None, label_dim: int | None = None
         ) -> source.ArraySource:
    """Scenes 0 ... max_size - 1 of seed 0 as training sees them, drawn now: uint8 [max_size,16,16,3], each with its caption.

    Labels are 0. Resolution, channels and label_dim are what the caller expects (None: anything).
    Raises: ValueError where scenes are otherwise.
    """
    if max_size < 1:
        raise ValueError(f"max_size: got {max_size}, allowed: 1 or more")
    images, captions = draw(0, np.arange(max_size))
    scenes = source.ArraySource(images, np.zeros(max_size, np.int32), 0, scenes_text.chosen(captions))
    return source.check_source(scenes, "scenes", resolution=resolution, channels=channels, label_dim=label_dim)
