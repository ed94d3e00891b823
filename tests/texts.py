"""What the tests of text share: small networks that take it, and an encoder that makes states from words without a model."""

from __future__ import annotations

import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from sim_jax import networks
from sim_jax.data import captions
from sim_jax.types import Cond

TOKENS, WIDTH = 5, 6
NETWORK = {"precond": "DDPMPrecond", "model_type": "PixArt", "img_resolution": 8, "img_channels": 3, "hidden_size": 16, "depth": 1,
           "num_heads": 2, "mlp_ratio": 2.0, "caption_channels": WIDTH, "caption_tokens": TOKENS, "label_dropout": 0.1}
PROMPTS = ("a red square", "a blue circle", "a red circle left of a blue square", "two green triangles", "one", "a grey circle above a red one")


class TextNetwork(networks.Network):
    """A network with one hidden layer over pixels and the mean caption in place of the described one: traced and compiled in a moment."""

    def init(self, key):
        pixels = math.prod(self.image_shape)
        shapes = {"enc": (pixels, 16), "text": (self.text_dim, 16), "dec": (16, pixels)}
        return {name: {"weight": jax.random.normal(k, shape) / shape[0] ** 0.5}
                for k, (name, shape) in zip(jax.random.split(key, 3), shapes.items())}

    def denoise(self, params, x, sigma, cond=Cond(), *, dropout_keys=None):
        flat, s = x.reshape(x.shape[0], -1), sigma[:, None]
        hidden = flat / jnp.sqrt(s**2 + 1) @ params["enc"]["weight"]
        if cond.text is not None:  # None is the null caption
            valid = cond.text_mask[:, :, None].astype(jnp.float32)
            hidden += (cond.text.astype(jnp.float32) * valid).sum(1) / valid.sum(1) @ params["text"]["weight"]
        return ((flat + s * (jnp.tanh(hidden) @ params["dec"]["weight"])) / (s**2 + 1)).reshape(x.shape)


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
