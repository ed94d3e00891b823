"""Drawn scenes: coloured shapes on grey, 16 x 16 pixels, with captions of `scene_captions`; nothing is stored or downloaded.

Scene i of a seed is a function of (seed, i): its caption; how its shapes are arranged, which the caption says but for "and"; and how far each
is from its place in that arrangement, up to a pixel across and down, drawn again until the boxes around shapes are two pixels apart or more.
A relation holds where the way from the first shape to the second goes further in its direction than to either side.

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
GAP = 2             # pixels at least between two shapes' boxes
STRAY = 1           # pixels that a shape may be off its place, across and down
MOST = 3            # shapes in a scene
SCENES = 131072     # that a data set has
GROUND = (128, 128, 128)
# Left and top of the boxes around a caption's shapes, before they stray.
_ALONE = ((5, 5),)
_TWO, _THREE = ((1, 5), (9, 5)), ((1, 1), (9, 1), (5, 9))
_RELATED = (((1, 5), (9, 5)), ((9, 5), (1, 5)), ((5, 1), (5, 9)), ((5, 9), (5, 1)))  # in the order of RELATIONS
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


def _arrangements(caption: Caption) -> Sequence[Sequence[tuple[int, int]]]:
    if len(caption.objects) != 2:
        return (_ALONE if len(caption.objects) == 1 else _THREE,)
    if caption.relation is not None:
        return (_RELATED[RELATIONS.index(caption.relation)],)
    return _RELATED if caption.form == "together" else (_TWO,)


@functools.cache
def _wanted() -> tuple[np.ndarray, np.ndarray]:
    """(number of shapes int [captions], their places in four equally likely arrangements int [captions,4,3,2]) of every caption."""
    captions = scene_captions.captions()
    places = np.zeros((len(captions), len(_RELATED), MOST, 2), np.int64)
    for i, caption in enumerate(captions):
        open_to = _arrangements(caption)
        for j in range(len(_RELATED)):
            arranged = open_to[j % len(open_to)]
            places[i, j, :len(arranged)] = arranged
    return np.array([len(caption.objects) for caption in captions]), places


def _apart(count: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether there is a GAP between any two of the first `count` shapes, bool [N]."""
    apart = np.ones(len(count), bool)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        apart &= (np.maximum(np.abs(x[:, a] - x[:, b]), np.abs(y[:, a] - y[:, b])) >= SIZE + GAP) | (count <= b)
    return apart


def place(seed: int, index: np.ndarray, caption: np.ndarray) -> Scenes:
    """Scenes `index` [N] of `seed` for given captions int [N]: where their shapes are."""
    out = Scenes(caption, *(np.zeros((len(index), MOST), np.int64) for _ in range(2)))
    counts, places = _wanted()
    home = places[caption, scene_captions.below(seed, index, 5, len(_RELATED))]
    left, attempt = np.arange(len(index)), 0
    while len(left):
        def stray(axis: int) -> np.ndarray:
            purposes = (16 * (MOST * attempt + j) + axis for j in range(MOST))
            return np.stack([scene_captions.below(seed, index[left], purpose, 2 * STRAY + 1) for purpose in purposes], 1) - STRAY

        x, y = (home[left, :, axis] + stray(3 + axis) for axis in (0, 1))
        apart = _apart(counts[caption[left]], x, y)
        out.x[left[apart]], out.y[left[apart]] = x[apart], y[apart]
        left, attempt = left[~apart], attempt + 1
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
