"""Stable Diffusion's autoencoder (`sd-vae-ft-ema` and others of its shape), under three code bases' names.

    diffusers' AutoencoderKL     diffusion_pytorch_model.safetensors or .bin; names kept here. Older files call the attention's layers
                                 query, key, value, proj_attn
    CompVis/latent-diffusion     {"state_dict": ...}: encoder.down.0.block.1.conv1, decoder.up.3 is the lowest resolution, the attention's
                                 layers are 1x1 convolutions; `loss.` and `model_ema.` belong to training and are left out

Neither holds the scaling factor: it is read from the config.json that diffusers keeps beside, or said (--network), or 0.18215.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from sim_jax import autoencoder, param_table
from sim_jax.convert import conversion, renaming, transformer
from sim_jax.convert.conversion import Converted, Options
from sim_jax.convert.pickle_machine import Refused

_OLDER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_TRAINING = ("loss.", "model_ema.")
_ORIGINAL = (  # of the original names, in this order
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."), (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."), (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."), (r"\.down\.(\d)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.down\.(\d)\.downsample\.", r".down_blocks.\1.downsamplers.0."), (r"\.up\.(\d)\.block\.", r".up_blocks.\1.resnets."),
    (r"\.up\.(\d)\.upsample\.", r".up_blocks.\1.upsamplers.0."), (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"coder\.norm_out\.", "coder.conv_norm_out."))
_ATTENTION = re.compile(r"(?:en|de)coder\.mid_block\.attentions\.0\.to_(?:q|k|v|out\.0)\.weight")


def read(path: str, options: Options = Options()) -> Converted:
    """An autoencoder. Raises: ValueError for anything else: names that are missing, unused or of another shape, a shift of latents."""
    try:
        state, given, _ = transformer.open_state(path, options)
        config = renaming.config_beside(path, ("AutoencoderKL",))
        for key in ("shift_factor", "latents_mean", "latents_std"):
            if config.get(key) is not None:
                raise ValueError(f"config.json beside it: {key}: got {config[key]!r}, allowed: none, as Stable Diffusion's has")
        beside = {key: config[key] for key in ("scaling_factor", "norm_num_groups") if key in config}
        return from_arrays(state, {**beside, **given}, source=path)
    except Refused as error:
        raise ValueError(f"{path}: {error}") from None


def from_arrays(state: Mapping[str, np.ndarray], given: Mapping[str, Any], *, source: str) -> Converted:
    """Checks a state under any of the names against itself and against what is said about it."""
    state = to_ours(state)
    found = describe(state)
    wrong = [f"{key}: {given[key]!r}, but its tensors say {found[key]!r}" for key in sorted(found.keys() & given.keys())
             if given[key] != found[key]]
    if wrong:
        raise ValueError(f"{source}: its description says {'; '.join(wrong)}")
    network = autoencoder.build({**found, **given})
    param_table.check(state, network.shapes(), prefix="", source=source)
    conversion.check_numbers(state, source=source)
    return Converted(state, network, {})


def to_ours(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The state under diffusers' present names; names that are in no table stay as they are. Raises: ValueError for one name twice."""
    original = any(name.startswith(("encoder.down.", "first_stage_model.")) for name in state)
    state = {name.removeprefix("first_stage_model."): array for name, array in state.items() if not name.startswith(_TRAINING)}
    levels = len({name.split(".")[2] for name in state if name.startswith("decoder.up.")})
    out = {}
    for name, array in state.items():
        new = _rename(name, levels) if original else re.sub(
            r"\.attentions\.0\.(query|key|value|proj_attn)\.", lambda match: f".attentions.0.{_OLDER[match[1]]}.", name)
        if new in out:
            raise ValueError(f"{name} and another tensor are both {new}")
        out[new] = array[:, :, 0, 0] if _ATTENTION.fullmatch(new) and array.shape[2:] == (1, 1) else array
    return out


def _rename(name: str, levels: int) -> str:
    name = re.sub(r"^decoder\.up\.(\d)\.", lambda match: f"decoder.up.{(levels - 1 - int(match[1])) % 10}.", name)
    for pattern, new in _ORIGINAL:
        name = re.sub(pattern, new, name)
    return name


def describe(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The description that the tensors imply, without scaling factor and groups."""
    levels = transformer.depth(state, "encoder.down_blocks")
    return {"model_type": autoencoder.MODEL_TYPE, "img_channels": transformer.size(state, "encoder.conv_in.weight", 4)[1],
            "latent_channels": transformer.size(state, "decoder.conv_in.weight", 4)[1],
            "block_out_channels": tuple(transformer.size(state, f"encoder.down_blocks.{i}.resnets.0.conv1.weight", 4)[0]
                                        for i in range(levels)),
            "layers_per_block": transformer.depth(state, "encoder.down_blocks.0.resnets")}
