"""What the tests of text share: a small PixArt, and an encoder that makes states from words without a model."""

from __future__ import annotations

import zlib

import numpy as np

from sim_jax.data import captions

TOKENS, WIDTH = 5, 6
NETWORK = {"precond": "DDPMPrecond", "model_type": "PixArt", "img_resolution": 8, "img_channels": 3, "hidden_size": 16, "depth": 1,
           "num_heads": 2, "mlp_ratio": 2.0, "caption_channels": WIDTH, "caption_tokens": TOKENS, "label_dropout": 0.1}
PROMPTS = ("a red square", "a blue circle", "a red circle left of a blue square", "two green triangles", "one", "a grey circle above a red one")


class WordEncoder:
    """A token per word (and one for the end), whose state is noise seeded by the word."""

    name, width, max_tokens = "words", WIDTH, TOKENS

    def __init__(self):
        self.calls: list[list[str]] = []

    def lengths(self, prompts):
        return [len(prompt.split()) + 1 for prompt in prompts]

    def encode(self, prompts):
        self.calls.append(list(prompts))
        states, mask = np.zeros((len(prompts), TOKENS, WIDTH), np.float32), np.zeros((len(prompts), TOKENS), bool)
        for row, prompt in enumerate(prompts):
            words = [*prompt.split(), "</s>"][:TOKENS]
            for place, word in enumerate(words):
                states[row, place] = np.random.default_rng(zlib.crc32(word.encode())).standard_normal(WIDTH)
            mask[row, :len(words)] = True
        return states, mask


def made(prompts=PROMPTS) -> captions.ArrayCaptions:
    return captions.encoded(WordEncoder(), prompts)


def rows(count: int, text: captions.ArrayCaptions | None = None) -> dict[str, np.ndarray]:
    """A batch of captions in turn."""
    states, mask = (made() if text is None else text).text(np.arange(count) % len(PROMPTS))
    return {"text": states, "text_mask": mask}
