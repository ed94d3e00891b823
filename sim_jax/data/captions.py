"""Captions as networks take them: a text encoder's last states with a mask, padded to one length, in random access.

They come from a directory of `sim_jax.data.embed_prompts` (see `embedded`), from the package ("builtin:scenes"), from memory
(`ArrayCaptions`), or with the images of a source, where caption i belongs to image i.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import pathlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from sim_jax.data import embedded
from sim_jax.data.encoders import Encoder

BUILTIN = {"scenes": "sim_jax.data.scenes_text"}  # name: the module whose `open_captions(part)` makes them, an ArrayCaptions
_BUILTIN = "builtin:"
_MEMORY = 4 << 30  # bytes of captions that are encoded without a directory
_MANY, _AT_ONCE = 4096, 64  # prompts whose tokens are counted, and whose states are computed, at a time


class Captions(Protocol):
    """What `text` reads from.

    Attributes:
      width: D, channels of a token.
      max_tokens: L, what every caption is padded to.
      encoder: the text encoder's name.
      prompts: the texts, in order.
      null: [1,n,D], the states of the empty prompt, all of its tokens valid; None where nobody encoded it.
    """

    width: int
    max_tokens: int
    encoder: str
    prompts: Sequence[str]
    null: np.ndarray | None

    def __len__(self) -> int: ...

    def text(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Captions `index` [n]: states [n,L,D], float32 or bfloat16 and zero where there is no token, and mask [n,L] bool."""

    def padded(self, tokens: int) -> Captions:
        """The same captions with L = `tokens`. Raises: ValueError where one is, or may be, longer."""


@dataclasses.dataclass(frozen=True, eq=False)
class ArrayCaptions:
    """Captions in memory: states [N,L,D] float32 or bfloat16, mask [N,L] bool, and their texts."""

    states: np.ndarray
    mask: np.ndarray
    prompts: Sequence[str]
    encoder: str
    null: np.ndarray | None = None

    def __post_init__(self):
        if self.states.ndim != 3 or not len(self.states) or len(self.prompts) != len(self.states):
            raise ValueError(f"text: got states {self.states.shape} for {len(self.prompts)} captions, allowed: [N,L,D], one or more")
        if self.mask.shape != self.states.shape[:2] or self.mask.dtype != bool:
            raise ValueError(f"text_mask: got {self.mask.dtype} {self.mask.shape}, allowed: bool {self.states.shape[:2]}")
        if not self.mask.any(1).all():
            raise ValueError(f"text_mask: got no token for caption {int(np.argmin(self.mask.any(1)))}, allowed: at least one each")

    width = property(lambda self: self.states.shape[2])
    max_tokens = property(lambda self: self.states.shape[1])

    def __len__(self) -> int:
        return len(self.states)

    def text(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.states[index], self.mask[index]

    def take(self, index: Sequence[int] | np.ndarray) -> ArrayCaptions:
        """Captions `index` [n], in that order, repeats kept."""
        return dataclasses.replace(self, states=self.states[index], mask=self.mask[index], prompts=[self.prompts[i] for i in index])

    def padded(self, tokens: int) -> ArrayCaptions:
        """The same captions with L = `tokens`. Raises: ValueError where one has more."""
        longest = int(np.flatnonzero(self.mask.any(0))[-1]) + 1
        if longest > tokens:
            raise ValueError(f"text: got captions of {longest} tokens, allowed: {tokens}, what the network takes")
        extra = max(tokens - self.max_tokens, 0)
        states, mask = np.pad(self.states, ((0, 0), (0, extra), (0, 0))), np.pad(self.mask, ((0, 0), (0, extra)))
        return dataclasses.replace(self, states=states[:, :tokens], mask=mask[:, :tokens])


def read_prompts(path: str | os.PathLike, *, key: str = "--prompts") -> list[str]:
    """The prompts in a text file, a line each, without blank lines. Raises: ValueError for none, or a file that cannot be read."""
    try:
        lines = pathlib.Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{key}: got {str(path)!r}, allowed: a text file in UTF-8 ({getattr(error, 'strerror', None) or error})") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{key}: got {str(path)!r}, which has no prompts; allowed: a prompt a line")
    return prompts


def cut(encoder: Encoder, prompts: Sequence[str]) -> tuple[int, str | None]:
    """How many prompts the encoder will cut, and a warning that says so; None for none."""
    count = sum(n > encoder.max_tokens for start in range(0, len(prompts), _MANY) for n in encoder.lengths(prompts[start: start + _MANY]))
    return count, f"warning: {count} of {len(prompts)} prompts have more than {encoder.max_tokens} tokens and are cut" if count else None


def encoded(encoder: Encoder, prompts: Sequence[str]) -> ArrayCaptions:
    """Prompts as `encoder` (see `encoders`) reads them, now and in memory, with the empty prompt beside them.

    Raises: ValueError for no prompts, or more than 4 GiB of them.
    """
    prompts = list(prompts)
    if not prompts:
        raise ValueError("prompts: got none, allowed: at least one")
    most = _MEMORY // (4 * encoder.max_tokens * encoder.width)
    if len(prompts) > most:
        raise ValueError(f"prompts: got {len(prompts)}, allowed: {most} at once; more by sim_jax.data.embed_prompts, and then as captions")
    given = [*prompts, ""]
    parts = [encoder.encode(given[start: start + _AT_ONCE]) for start in range(0, len(given), _AT_ONCE)]
    states, mask = (np.concatenate(arrays) for arrays in zip(*parts))
    return ArrayCaptions(states[:-1], mask[:-1], prompts, encoder.name, states[-1:, mask[-1]])


def is_builtin(path: str) -> bool:
    return path.startswith(_BUILTIN)


def open_captions(path: str, *, key: str = "text.path") -> Captions:
    """Captions by their path: a directory of `sim_jax.data.embed_prompts`, or "builtin:NAME" (and ":PART" of it).

    Raises: ValueError, which begins with `key`, for anything missing, damaged or unknown.
    """
    try:
        if not is_builtin(path):
            return embedded.open_directory(path)
        name, _, part = path.removeprefix(_BUILTIN).partition(":")
        if name not in BUILTIN:
            raise ValueError(f"got {path!r}, allowed: a directory, {', '.join(_BUILTIN + known for known in BUILTIN)}")
        return importlib.import_module(BUILTIN[name]).open_captions(part)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def fitted(captions: Captions, *, width: int, tokens: int | None, key: str = "text.path") -> Captions:
    """The captions, padded to what a network takes.

    Args:
      width: channels of the network's captions.
      tokens: L, or None where the network takes any number.
      key: what the message begins with.
    Raises: ValueError for captions of another width, or longer ones.
    """
    if captions.width != width:
        raise ValueError(f"{key}: got captions of {captions.width} channels ({captions.encoder}), allowed: {width}, the network's "
                         "caption_channels")
    if tokens is None or tokens == captions.max_tokens:
        return captions
    try:
        return captions.padded(tokens)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
