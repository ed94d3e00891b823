"""CLIP and LAION's aesthetic predictor from files that the user has, by `transformers` and PyTorch; see `text_scores`."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

_EXTRA = "pip install 'sim_jax[text]'"
_LAYER = re.compile(r"(?:layers\.)?(\d+)\.(weight|bias)")


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
    """A CLIP: `embed(images, texts)`; `width` is that of its embeddings."""

    model: Any
    processor: Any
    name: str

    width = property(lambda self: self.model.config.projection_dim)

    def embed(self, images: Sequence[np.ndarray], texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Unit embeddings, float32 [N,width] each, of images uint8 [H,W,3] and texts (cut at CLIP's limit)."""
        import torch

        given = self.processor(text=list(texts), images=list(images), return_tensors="pt", padding=True, truncation=True)
        with torch.no_grad():
            out = self.model(**{name: value.to(self.model.device) for name, value in given.items()})
        return tuple(_unit(array.float().cpu().numpy()) for array in (out.image_embeds, out.text_embeds))


def _unit(array: np.ndarray) -> np.ndarray:
    return array / np.linalg.norm(array, axis=1, keepdims=True)


@dataclasses.dataclass(frozen=True, eq=False)
class Aesthetic:
    """The predictor: linear layers, one after the other, on unit embeddings [N,width] -> [N]."""

    layers: tuple[tuple[np.ndarray, np.ndarray], ...]
    name: str

    def __call__(self, embeddings: np.ndarray) -> np.ndarray:
        out = np.asarray(embeddings, np.float64)
        for weight, bias in self.layers:
            out = out @ weight.T + bias
        return out[:, 0]


def _libraries(key: str) -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ValueError(f"{key}: needs the library {error.name!r}; {_EXTRA}") from None
    return torch, transformers


def open_clip(path: str | pathlib.Path, *, key: str = "--clip") -> Clip:
    """The CLIP in a directory. Raises: ValueError for none, one that cannot be read, or without the libraries."""
    path = pathlib.Path(path)
    if not (path / "config.json").is_file():
        raise ValueError(f"{key}: got {str(path)!r}, allowed: a directory with a CLIP and its processor, in transformers' format")
    torch, transformers = _libraries(key)
    transformers.logging.set_verbosity_error()
    try:
        model = transformers.CLIPModel.from_pretrained(path, local_files_only=True).eval()
        processor = transformers.CLIPProcessor.from_pretrained(path, local_files_only=True)
    except Exception as error:  # whatever the library makes of a damaged directory
        raise ValueError(f"{key}: got {str(path)!r}, which transformers cannot read ({' '.join(str(error).split())[:200]})") from None
    return Clip(model.to("cuda" if torch.cuda.is_available() else "cpu"), processor, path.resolve().name)


def open_aesthetic(path: str | pathlib.Path, *, width: int, key: str = "--aesthetic") -> Aesthetic:
    """The predictor in a file of weights, `layers.N.weight` and `.bias`.

    Args:
      width: of CLIP's embeddings.
    Raises: ValueError for a file that is not there, cannot be read, or whose layers do not go from `width` to one number.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"{key}: got {str(path)!r}, allowed: the predictor's weights, .pth or .safetensors")
    try:
        if path.suffix == ".safetensors":
            from safetensors.numpy import load_file

            state = load_file(path)
        else:
            torch, _ = _libraries(key)
            state = {name: value.float().numpy() for name, value in torch.load(path, map_location="cpu", weights_only=True).items()}
    except Exception as error:  # whatever the libraries make of a damaged file
        raise ValueError(f"{key}: {path} cannot be read ({' '.join(str(error).split())[:200]})") from None
    parts = {tuple(match.groups()): value for name, value in state.items() if (match := _LAYER.fullmatch(name))}
    numbers = sorted({int(number) for number, _ in parts})
    layers = [tuple(np.asarray(parts.get((str(n), kind), np.zeros(0)), np.float64) for kind in ("weight", "bias")) for n in numbers]
    sizes = [width, *(weight.shape[0] for weight, _ in layers if weight.ndim == 2)]
    fits = layers and len(parts) == len(state) and len(sizes) == len(layers) + 1 and sizes[-1] == 1 and all(
        weight.shape == (after, before) and bias.shape == (after,) for (weight, bias), before, after in zip(layers, sizes, sizes[1:]))
    if not fits:
        raise ValueError(f"{key}: {path} is not a stack of linear layers from {width} numbers to one; the predictor is for CLIP ViT-L/14")
    return Aesthetic(tuple(layers), path.name)
