"""The small transformers that goldens/text_to_image.npz and other tests compute with: parameters by `rule`, as networks of ours."""

from __future__ import annotations

import functools
import json
import pathlib

import jax
import numpy as np

import rule
from sim_jax import convert, networks, param_table
from sim_jax.convert import dit, pixart, renaming

GOLDEN = np.load(pathlib.Path(__file__).parent / "goldens" / "text_to_image.npz")
COUNTS = json.loads(str(GOLDEN["counts"]))
_SMALL = {"precond": "DDPMPrecond", "img_resolution": 8, "hidden_size": 48, "depth": 2, "num_heads": 4}
SPECS = {
    "pixart": {**_SMALL, "model_type": "PixArt", "caption_channels": 20, "caption_tokens": 0},
    "pixart_micro": {**_SMALL, "model_type": "PixArt", "caption_channels": 20, "caption_tokens": 0, "micro_conditions": True,
                     "interpolation_scale": 2.0},
    "dit": {**_SMALL, "model_type": "DiT", "label_dim": 5},
}
TEXT = rule.uniform("captions", (2, 7, 20))
MASK = np.array([[1] * 7, [1] * 3 + [0] * 4])
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiling is what takes the time here


def rows(case: str) -> list[renaming.Row]:
    """The table of a small network's names here and in diffusers."""
    return dit.rows(2) if case == "dit" else pixart.rows(2, micro_conditions=case == "pixart_micro")


def torch_shapes(network: networks.Network) -> dict[str, tuple[int, ...]]:
    return {name: param_table.torch_shape(leaf.shape) for name, leaf in param_table.flatten(network.shapes()).items()}


def diffusers_state(case: str) -> dict[str, np.ndarray]:
    """As goldens/make_text_to_image.py gave it to diffusers."""
    zeros = {name: np.broadcast_to(np.float32(0), shape) for name, shape in torch_shapes(networks.build(SPECS[case])).items()}
    return rule.state({name: array.shape for name, array in renaming.to_theirs(zeros, rows(case)).items()})


def state(case: str, **changes) -> dict[str, np.ndarray]:
    """Under our names."""
    return {**renaming.to_ours(diffusers_state(case), rows(case)), **changes}


@functools.cache
def small(case: str, tokens: int = 0, endpoint: bool = True, **options):
    """(network, parameters); with tokens, there is a null caption, "null" by the rule."""
    spec = {**SPECS[case], "caption_tokens": tokens} if tokens else SPECS[case]
    network = networks.build({**spec, "endpoint": endpoint}, **options)
    null = {pixart.NULL: rule.uniform("null", (tokens, 20))} if tokens else {}
    return network, convert.params_from_state(state(case, **null), network)


@functools.cache
def denoise(case: str, tokens: int = 0, **how):
    """The DenoiseFn of `small`, compiled once per shape for all tests."""
    network, params = small(case, tokens, **how)
    run = jit(network.denoise)
    return lambda x, sigma, cond: run(params, x, sigma, cond)


def nhwc(x) -> np.ndarray:
    return np.asarray(x, np.float32).transpose(0, 2, 3, 1)


def relative(got, wanted) -> float:
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))
