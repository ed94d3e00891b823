"""Text encoders: prompts to states and masks. The package's own, or a T5 in a directory, by the `transformers` library.

A T5's states are its encoder's last ones, after the final norm, of prompts cut and padded to max_tokens under their attention mask:
PixArt-alpha (arXiv 2310.00426, section 2.2) has T5-XXL's 4096 channels at 120 tokens.
"""

from __future__ import annotations

import importlib
import pathlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

BUILTIN = {"scenes": "sim_jax.data.scenes_text"}  # name: the module whose `make_encoder()` makes it
_BUILTIN = "builtin:"
MAX_TOKENS = 120  # PixArt-alpha's
DTYPES = ("float32", "bfloat16")
_EXTRA = "pip install 'sim_jax[text]'"


class Encoder(Protocol):
    """What `encode` is asked of.

    Attributes:
      name: written beside everything that it encodes.
      width: D, channels of its states.
      max_tokens: L.
    """

    name: str
    width: int
    max_tokens: int

    def encode(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """States [N,L,D] float32, zero where there is no token, and mask [N,L] bool; longer prompts are cut. Each by itself: a prompt's
        states do not depend on the others'."""

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt before it is cut."""


class T5:
    """The encoder half of a T5 in `transformers`' format; see `open_encoder`."""

    def __init__(self, model: Any, tokenizer: Any, name: str, max_tokens: int):
        self._model, self._tokenizer = model, tokenizer
        self.name, self.max_tokens, self.width = name, max_tokens, model.config.d_model

    def encode(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        import torch

        tokens = self._tokenizer(list(prompts), max_length=self.max_tokens, padding="max_length", truncation=True, return_tensors="pt")
        tokens = {name: tokens[name].to(self._model.device) for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            states = self._model(**tokens).last_hidden_state.float().cpu().numpy()
        mask = tokens["attention_mask"].cpu().numpy().astype(bool)
        return np.where(mask[:, :, None], states, np.float32(0)), mask

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self._tokenizer(list(prompts), verbose=False)["input_ids"]]


def open_encoder(path: str, *, max_tokens: int | None = None, dtype: str = "float32", key: str = "encoder") -> Encoder:
    """An encoder by its path: "builtin:NAME", or a directory with a T5 and its tokenizer (in `text_encoder/` and `tokenizer/`, or both in it).

    Args:
      max_tokens: L; None: 120, or the built-in encoder's own.
      dtype: what a T5 computes in, of DTYPES.
    Raises: ValueError, which begins with `key`, for an unknown name, a directory that is no T5, or without the libraries that it needs.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, allowed: {', '.join(DTYPES)}")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens: got {max_tokens}, allowed: 1 or more")
    if path.startswith(_BUILTIN):
        name = path.removeprefix(_BUILTIN)
        if name not in BUILTIN:
            raise ValueError(f"{key}: got {path!r}, allowed: a directory, {', '.join(_BUILTIN + known for known in BUILTIN)}")
        encoder = importlib.import_module(BUILTIN[name]).make_encoder()
        if max_tokens not in (None, encoder.max_tokens):
            raise ValueError(f"max_tokens: got {max_tokens} with {path}, allowed: {encoder.max_tokens}")
        return encoder
    return _open_t5(pathlib.Path(path), MAX_TOKENS if max_tokens is None else max_tokens, dtype, key)


def _open_t5(path: pathlib.Path, max_tokens: int, dtype: str, key: str) -> T5:
    if not path.is_dir():
        raise ValueError(f"{key}: got {str(path)!r}, which is no directory; allowed: one with a T5 and its tokenizer, "
                         f"{', '.join(_BUILTIN + known for known in BUILTIN)}")
    parts = [path / name if (path / name).is_dir() else path for name in ("text_encoder", "tokenizer")]
    if not (parts[0] / "config.json").is_file():
        raise ValueError(f"{key}: got {str(path)!r}, which has no config.json; allowed: a directory with a T5 and its tokenizer")
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ValueError(f"{key}: {str(path)!r} needs the library {error.name!r}; {_EXTRA}") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model = transformers.T5EncoderModel.from_pretrained(parts[0], dtype=getattr(torch, dtype), local_files_only=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(parts[1], local_files_only=True)
    except Exception as error:  # whatever the library makes of a damaged directory
        what = " ".join(str(error).split())[:200]
        raise ValueError(f"{key}: got {str(path)!r}, which transformers cannot read ({what})") from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return T5(model.eval().to(device), tokenizer, f"t5:{path.resolve().name}", max_tokens)
