"""A frozen text encoder for the captions of scenes, made of fixed random signs: it stands for a language model, and is the same everywhere.

With word vectors e and positions p of random signs, h_i = e_i + p_i / 2, and one fixed layer mixes each word with its neighbours and with
the part that it has in a relation, so that a noun's state knows its adjective, and what it is left of:

    state_i = (h_i + h_{i-1} A + h_{i+1} B + r_i) / 2        A, B: random signs / sqrt(D); h is zero outside of the caption

r_i are random signs for each relation and each side of it, on the words before and after the relation's own, the end token among them; 0 in captions
without one. A caption ends with an end token, as T5's do; it is all that the empty caption has.

Without r, noun and relation are in the states, too, but a small network of images has to put them together: after 240 thousand images it
had not begun to; with r it has learned relations after 80 thousand [measured with configs/scenes.py:teacher].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from sim_jax.data.captions import ArrayCaptions, encoded
from sim_jax.data.scene_captions import RELATIONS, WORDS, captions, draw_captions

_END = len(WORDS)
DRAWN = 4096  # captions that a run without images goes through


def signs(name: int, *shape: int) -> np.ndarray:
    """Fixed random signs, float32: bits of numpy's Philox, which it promises never to change."""
    bits = np.random.Philox(key=np.array([name, 0], np.uint64)).random_raw(int(np.prod(shape))) & np.uint64(1)
    return np.float32(2) * bits.reshape(shape).astype(np.float32) - np.float32(1)


class SceneEncoder:
    """The module docstring's encoder (see `encoders.Encoder`)."""

    name = "builtin:scenes"
    width = 64
    max_tokens = 9

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt, the end among them, before it is cut."""
        return [len(prompt.split()) + 1 for prompt in prompts]

    def encode(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """States [N,max_tokens,width] float32, zero where there is no token, and mask [N,max_tokens] bool; longer prompts are cut.

        Raises: ValueError for a word that no caption of scenes has.
        """
        ids = np.full((len(prompts), self.max_tokens), -1)
        for row, prompt in enumerate(prompts):
            words = prompt.lower().split()
            unknown = next((word for word in words if word not in WORDS), None)
            if unknown is not None:
                raise ValueError(f"got the word {unknown!r} in {prompt!r}, allowed with {self.name}: {', '.join(WORDS)}")
            tokens = [*(WORDS.index(word) for word in words[: self.max_tokens - 1]), _END]
            ids[row, : len(tokens)] = tokens
        mask = ids >= 0
        vectors, places = signs(1, len(WORDS) + 1, self.width), signs(2, self.max_tokens, self.width)
        h = np.where(mask[..., None], vectors[ids] + places[None] / 2, np.float32(0))
        before, after = (signs(name, self.width, self.width) / np.float32(self.width) ** 0.5 for name in (3, 4))
        parts = signs(6, len(RELATIONS), 2, self.width)
        mixed = h + np.array([self._sides(prompt.lower().split(), parts) for prompt in prompts], np.float32).reshape(h.shape)
        mixed[:, 1:] += h[:, :-1] @ before
        mixed[:, :-1] += h[:, 1:] @ after
        return np.where(mask[..., None], mixed / np.float32(2), np.float32(0)), mask

    def _sides(self, words: Sequence[str], parts: np.ndarray) -> np.ndarray:
        """r of the module docstring, [max_tokens,width], for the relation in `words`; `parts` are each relation's two."""
        out = np.zeros((self.max_tokens, self.width), np.float32)
        for number, relation in enumerate(RELATIONS):
            own = relation.split()
            at = next((i for i in range(len(words)) if list(words[i:i + len(own)]) == own), None)
            if at is not None:
                out[:at] = parts[number, 0]
                out[at + len(own):] = parts[number, 1]
                break
        return out


def make_encoder() -> SceneEncoder:
    return SceneEncoder()


@dataclasses.dataclass(frozen=True, eq=False)
class ChosenCaptions:
    """Captions `numbers` [N] of the grammar, repeats and all, as `captions.Captions`; their states are kept once each."""

    numbers: np.ndarray
    grammar: ArrayCaptions

    width = property(lambda self: self.grammar.width)
    max_tokens = property(lambda self: self.grammar.max_tokens)
    encoder = property(lambda self: self.grammar.encoder)
    null = property(lambda self: self.grammar.null)
    prompts = property(lambda self: [self.grammar.prompts[i] for i in self.numbers])

    def __len__(self) -> int:
        return len(self.numbers)

    def text(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.grammar.text(self.numbers[index])

    def padded(self, tokens: int) -> ChosenCaptions:
        return dataclasses.replace(self, grammar=self.grammar.padded(tokens))


def chosen(numbers: np.ndarray) -> ChosenCaptions:
    """Captions `numbers` [N] of `scene_captions.captions()`."""
    return ChosenCaptions(numbers, encoded(make_encoder(), [caption.text for caption in captions()]))


def open_captions(part: str) -> ChosenCaptions:
    """Captions of training, as often as scenes have them (""), or those that are held out, each once ("held_out").

    Raises: ValueError for another part.
    """
    parts = {"": lambda: draw_captions(0, np.arange(DRAWN)),
             "held_out": lambda: np.flatnonzero([caption.held_out for caption in captions()])}
    if part not in parts:
        raise ValueError(f"got 'builtin:scenes:{part}', allowed: {', '.join(':'.join(filter(None, ('builtin:scenes', name))) for name in parts)}")
    return chosen(parts[part]())
