"""DiT's family: facebookresearch/DiT's `DiT-XL-2-256x256.pt` (a flat state dict, or a training checkpoint's "ema"), whose names are
kept here, and diffusers' `DiTTransformer2DModel`, which repeats the two embedders in every block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sim_jax.convert import renaming, transformer
from sim_jax.convert.conversion import Converted, Options

MODEL_TYPE = "DiT"
_CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")
_OUTER = {"x_embedder.proj": "pos_embed.proj", "final_layer.adaLN_modulation.1": "proj_out_1", "final_layer.linear": "proj_out_2"}
_BLOCK = {"attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"), "attn.proj": "attn1.to_out.0", "mlp.fc1": "ff.net.0.proj",
          "mlp.fc2": "ff.net.2", "adaLN_modulation.1": "norm1.linear"}
_REPEATED = {"t_embedder.mlp.0.weight": "timestep_embedder.linear_1.weight", "t_embedder.mlp.0.bias": "timestep_embedder.linear_1.bias",
             "t_embedder.mlp.2.weight": "timestep_embedder.linear_2.weight", "t_embedder.mlp.2.bias": "timestep_embedder.linear_2.bias",
             "y_embedder.embedding_table.weight": "class_embedder.embedding_table.weight"}


def rows(depth: int) -> list[renaming.Row]:
    """The original names and diffusers'."""
    blocks = [row for i in range(depth) for row in renaming.layers(_BLOCK, f"blocks.{i}.", f"transformer_blocks.{i}.")]
    repeated = [renaming.Row(ours, tuple(f"transformer_blocks.{i}.norm1.emb.{theirs}" for i in range(depth)), copies=True)
                for ours, theirs in _REPEATED.items()]
    return renaming.layers(_OUTER) + blocks + repeated


def read(path: str, options: Options = Options()) -> Converted:
    """A teacher. Raises: ValueError for anything that is not DiT's, or contradicts itself."""
    return transformer.read(path, options, classes=_CLASSES, from_arrays=from_arrays,
                            rows=lambda state: rows(transformer.depth(state, "transformer_blocks")))


def from_arrays(state: Mapping[str, np.ndarray], given: Mapping[str, Any], info: Mapping[str, Any], *, source: str) -> Converted:
    """Checks a state under the original names against itself and against what is said about it."""
    found = transformer.describe(state, MODEL_TYPE)
    found["label_dim"] = transformer.size(state, "y_embedder.embedding_table.weight", 2)[0] - 1
    return transformer.finish(dict(state), found, given, info, source=source, scale=lambda side: 1.0)


def to_diffusers(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The state of `DiTTransformer2DModel` from ours, without pos_embed; views."""
    return renaming.to_theirs(state, rows(transformer.depth(state, "blocks")))
