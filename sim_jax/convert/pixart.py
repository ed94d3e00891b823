"""PixArt-alpha's family (PixArt-alpha/PixArt-alpha): `PixArt-XL-2-512x512.pth` and the like ({"state_dict": ...}), whose names are kept
here, and diffusers' `PixArtTransformer2DModel` (its older `Transformer2DModel` has the same names), which leaves the null caption out.

The 1024-pixel network computes its positions from the image, so the pos_embed in its file says nothing and is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sim_jax.convert import renaming, transformer
from sim_jax.convert.conversion import Converted, Options

MODEL_TYPE = "PixArt"
NULL = "y_embedder.y_embedding"
_CLASSES = ("PixArtTransformer2DModel", "Transformer2DModel")
_OUTER = {"x_embedder.proj": "pos_embed.proj", "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
          "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2", "t_block.1": "adaln_single.linear",
          "y_embedder.y_proj.fc1": "caption_projection.linear_1", "y_embedder.y_proj.fc2": "caption_projection.linear_2",
          "final_layer.linear": "proj_out"}
_MICRO = {f"{ours}.mlp.{i}": f"adaln_single.emb.{theirs}.linear_{j}" for i, j in ((0, 1), (2, 2))
          for ours, theirs in (("csize_embedder", "resolution_embedder"), ("ar_embedder", "aspect_ratio_embedder"))}
_BLOCK = {"attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"), "attn.proj": "attn1.to_out.0", "cross_attn.q_linear": "attn2.to_q",
          "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"), "cross_attn.proj": "attn2.to_out.0", "mlp.fc1": "ff.net.0.proj",
          "mlp.fc2": "ff.net.2"}


def rows(depth: int, *, micro_conditions: bool) -> list[renaming.Row]:
    """The original names, without the null caption's, and diffusers'."""
    out = renaming.layers(_OUTER) + (renaming.layers(_MICRO) if micro_conditions else [])
    out += [row for i in range(depth) for row in renaming.layers(_BLOCK, f"blocks.{i}.", f"transformer_blocks.{i}.")]
    tables = [(f"blocks.{i}", f"transformer_blocks.{i}.") for i in range(depth)] + [("final_layer", "")]
    return out + [renaming.Row(f"{ours}.scale_shift_table", (f"{theirs}scale_shift_table",)) for ours, theirs in tables]


def read(path: str, options: Options = Options()) -> Converted:
    """A teacher. Raises: ValueError for anything that is not PixArt-alpha's, or contradicts itself."""
    def table(state: Mapping[str, np.ndarray]) -> list[renaming.Row]:
        micro = any(name.startswith("adaln_single.emb.resolution_embedder.") for name in state)
        return rows(transformer.depth(state, "transformer_blocks"), micro_conditions=micro)

    return transformer.read(path, options, rows=table, classes=_CLASSES, from_arrays=from_arrays)


def from_arrays(state: Mapping[str, np.ndarray], given: Mapping[str, Any], info: Mapping[str, Any], *, source: str) -> Converted:
    """Checks a state under the original names against itself and against what is said about it."""
    found = transformer.describe(state, MODEL_TYPE)
    found["caption_channels"] = transformer.size(state, "y_embedder.y_proj.fc1.weight", 2)[1]
    found["caption_tokens"] = transformer.size(state, NULL, 2)[0] if NULL in state else 0
    found["micro_conditions"] = micro = "csize_embedder.mlp.0.weight" in state
    given = dict(given)
    if micro:
        given.setdefault("img_resolution", 128)  # the published one's
    # Trained at 256 and 512 pixels on the same range of positions, and at 1024 on that range again.
    return transformer.finish(dict(state), found, given, info, source=source, scale=lambda side: float(max(side // 64, 1)),
                              check_positions=not micro)


def to_diffusers(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The state of `PixArtTransformer2DModel` from ours; views. The null caption has no name there and is left out."""
    table = rows(transformer.depth(state, "blocks"), micro_conditions="csize_embedder.mlp.0.weight" in state)
    return renaming.to_theirs({name: array for name, array in state.items() if name != NULL}, table)
