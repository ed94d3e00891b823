"""A small language for scenes: captions of one to three coloured shapes.

    one         "a red square"
    several     "two green triangles", "three blue circles"
    relation    "a red square left of a blue circle"; left of, right of, above, below
    together    "a red square and a blue circle", wherever they are

A kind is a colour and a shape; the two kinds of a caption differ. Training never sees the kinds of HELD_KINDS, nor the pairs of
HELD_PAIRS in one scene: captions with either are held out, and ask for a combination of what was seen apart.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import numpy as np

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0)}
SHAPES = ("square", "circle", "triangle")
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {2: "two", 3: "three"}
KINDS = tuple(itertools.product(COLOURS, SHAPES))
HELD_KINDS = (("yellow", "triangle"), ("green", "circle"))
HELD_PAIRS = tuple(frozenset(pair) for pair in (
    (("red", "square"), ("blue", "circle")), (("red", "circle"), ("yellow", "square")), (("green", "square"), ("blue", "triangle")),
    (("red", "triangle"), ("yellow", "circle")), (("blue", "square"), ("green", "triangle"))))
_SHARES = {"one": 3, "several": 5, "relation": 6, "together": 2}  # how often each form of caption comes, in sixteenths
WORDS = ("a", "and", "of", *NUMBERS.values(), *COLOURS, *SHAPES, *(f"{s}s" for s in SHAPES), "left", "right", "above", "below")


class Caption(NamedTuple):
    """text; objects: the kinds (colour, shape) that are there; relation: of the first object to the second, None where it is open."""

    text: str
    objects: tuple[tuple[str, str], ...]
    relation: str | None = None

    @property
    def form(self) -> str:
        if len(set(self.objects)) == 1:
            return "one" if len(self.objects) == 1 else "several"
        return "together" if self.relation is None else "relation"

    @property
    def new_kind(self) -> bool:
        return any(kind in HELD_KINDS for kind in self.objects)

    @property
    def held_out(self) -> bool:
        return self.new_kind or frozenset(self.objects) in HELD_PAIRS


@functools.cache
def captions() -> tuple[Caption, ...]:
    """All captions of the grammar, in a fixed order."""
    out = [Caption(f"a {colour} {shape}", ((colour, shape),)) for colour, shape in KINDS]
    out += [Caption(f"{word} {colour} {shape}s", ((colour, shape),) * n) for n, word in NUMBERS.items() for colour, shape in KINDS]
    for (a, b), how in itertools.product(itertools.permutations(KINDS, 2), (*RELATIONS, "and")):
        out.append(Caption(f"a {' '.join(a)} {how} a {' '.join(b)}", (a, b), None if how == "and" else how))
    return tuple(out)


def parse(text: str) -> Caption:
    """The caption that a text is. Raises ValueError for a text that is not of the grammar."""
    found = _by_text().get(" ".join(text.split()))
    if found is None:
        raise ValueError(f"caption: got {text!r}, allowed: one of the scenes' grammar, such as "
                         "'two green triangles' or 'a red square left of a blue circle'")
    return found


@functools.cache
def _by_text() -> dict[str, Caption]:
    return {caption.text: caption for caption in captions()}


def _random(seed: int, index: np.ndarray, purpose: int) -> np.ndarray:
    """uint64 [N], the splitmix64 hash of (seed, index, purpose): integer arithmetic, so the same everywhere."""
    z = np.full(index.shape, seed, np.uint64)
    for word in (np.uint64(purpose), index.astype(np.uint64)):
        z = (z ^ word) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return z


def below(seed: int, index: np.ndarray, purpose: int, limit: np.ndarray | int) -> np.ndarray:
    """int64 [N] in [0, limit)."""
    return (_random(seed, index, purpose) >> np.uint64(33)).astype(np.int64) % limit


@functools.cache
def _by_form() -> dict[str, np.ndarray]:
    """The numbers of the captions that training sees, by form."""
    seen = [(i, caption) for i, caption in enumerate(captions()) if not caption.held_out]
    return {form: np.array([i for i, caption in seen if caption.form == form]) for form in _SHARES}


def draw_captions(seed: int, index: np.ndarray) -> np.ndarray:
    """Which captions of `captions()` that scenes `index` [N] of training have, int64 [N]; none is held out."""
    edges = np.cumsum(list(_SHARES.values()))
    form = np.digitize(below(seed, index, 0, edges[-1]), edges)
    out = np.empty(index.shape, np.int64)
    for number, choices in enumerate(_by_form().values()):
        here = form == number
        out[here] = choices[below(seed, index[here], 1, len(choices))]
    return out
