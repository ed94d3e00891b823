"""Drawn scenes: coloured shapes on grey, 16 x 16 pixels, with captions of `scene_captions`; nothing is stored or downloaded.

Scene i of a seed is a function of (seed, i): its caption, then places, drawn again until they fit: the boxes around shapes at least a pixel
apart, and where the caption says so in the relation: a is left of b where the way from a's place to b's goes to the right further than it
goes up or down; and likewise for the others.

The ground is grey, not black: a data set whose mean is far from 0 comes out too bright, as that hardly shows in the loss at much noise.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sim_jax.data import scene_captions, scenes_text, source
from sim_jax.data.scene_captions import COLOURS, RELATIONS, SHAPES, Caption

RESOLUTION = 16
SIZE = 6            # pixels across a shape
PLACES = (1, 9)     # where the box around a shape may begin, across and down
MOST = 3            # shapes in a scene
SCENES = 131072     # that a data set has
GROUND = (128, 128, 128)
_ROWS = {"square": (6, 6, 6, 6, 6, 6), "circle": (2, 4, 6, 6, 4, 2), "triangle": (2, 2, 4, 4, 6, 6)}  # widths of rows, each centred


class Scenes(NamedTuple):
    """caption: int [N] in `scene_captions.captions()`; x, y: int [N,3], left and top of the box around each shape.

    Shapes come in the order of the caption's objects; what is beyond their number means nothing.
    """

    caption: np.ndarray
    x: np.ndarray
    y: np.ndarray


@functools.cache
def template(shape: str) -> np.ndarray:
    """The pixels of a shape, bool [6,6]."""
    return np.stack([np.abs(2 * np.arange(SIZE) - SIZE + 1) < width for width in _ROWS[shape]])


def stands(relation: np.ndarray, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Whether the first shape stands in `relation` (a number of RELATIONS) to the second, which is (dx, dy) away from it; bool [N]."""
    along = np.stack([dx, -dx, dy, -dy])[relation, np.arange(len(dx))]
    return along > np.where(relation < 2, np.abs(dy), np.abs(dx))


@functools.cache
def _wanted() -> tuple[np.ndarray, np.ndarray]:
    """(number of shapes, relation or -1) of every caption, int [captions]."""
    captions = scene_captions.captions()
    return (np.array([len(c.objects) for c in captions]),
            np.array([-1 if c.relation is None else RELATIONS.index(c.relation) for c in captions]))


def _fits(caption: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    count, relation = (table[caption] for table in _wanted())
    fits = (relation < 0) | stands(np.maximum(relation, 0), x[:, 1] - x[:, 0], y[:, 1] - y[:, 0])
    for a, b in ((0, 1), (0, 2), (1, 2)):
        fits &= (np.maximum(np.abs(x[:, a] - x[:, b]), np.abs(y[:, a] - y[:, b])) > SIZE) | (count <= b)
    return fits


def place(seed: int, index: np.ndarray, caption: np.ndarray) -> Scenes:
    """Scenes `index` [N] of `seed` for given captions int [N]: places that fit."""
    out = Scenes(caption, *(np.zeros((len(index), MOST), np.int64) for _ in range(2)))
    left, attempt = np.arange(len(index)), 0
    while len(left):
        def draw_places(axis: int) -> np.ndarray:
            purposes = (16 * (MOST * attempt + j) + axis for j in range(MOST))
            return np.stack([np.array(PLACES)[scene_captions.below(seed, index[left], purpose, len(PLACES))] for purpose in purposes], 1)

        x, y = draw_places(3), draw_places(4)
        fits = _fits(caption[left], x, y)
        out.x[left[fits]], out.y[left[fits]] = x[fits], y[fits]
        left, attempt = left[~fits], attempt + 1
    return out


@functools.cache
def _objects() -> np.ndarray:
    """(colour, shape) of every caption's objects by number, int [captions,3,2]; -1 where there is none."""
    out = np.full((len(scene_captions.captions()), MOST, 2), -1)
    for i, caption in enumerate(scene_captions.captions()):
        for j, (colour, shape) in enumerate(caption.objects):
            out[i, j] = list(COLOURS).index(colour), SHAPES.index(shape)
    return out


def render(scenes: Scenes) -> np.ndarray:
    """The pixels, uint8 [N,16,16,3]."""
    images = np.empty((len(scenes.caption), RESOLUTION, RESOLUTION, 3), np.uint8)
    images[...] = GROUND
    palette, stamps, span = np.array(list(COLOURS.values()), np.uint8), np.stack([template(shape) for shape in SHAPES]), np.arange(SIZE)
    for j in range(MOST):
        colour, shape = _objects()[scenes.caption, j].T
        n = np.flatnonzero(colour >= 0)
        rows, columns = ((a[n, j, None] + span[None]) for a in (scenes.y, scenes.x))
        at = (n[:, None, None], rows[:, :, None], columns[:, None, :])
        images[at] = np.where(stamps[shape[n]][..., None], palette[colour[n]][:, None, None], images[at])
    return images


def draw(seed: int, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scenes `index` [N] of training: (images uint8 [N,16,16,3], captions int64 [N])."""
    scenes = place(seed, index, scene_captions.draw_captions(seed, index))
    return render(scenes), scenes.caption


def draw_for(captions: Sequence[Caption], *, seed: int, start: int = 0) -> np.ndarray:
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
