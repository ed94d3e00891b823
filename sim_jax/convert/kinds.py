"""The families of checkpoints that can be converted: one module each, with `read(path, options) -> Converted`."""

from __future__ import annotations

import importlib
from typing import NamedTuple

from sim_jax.convert.conversion import Converted, Options


class Kind(NamedTuple):
    """A family: the module that reads it, what it is, and what it is for where it does not make images."""

    module: str
    summary: str
    purpose: str = ""

    @property
    def generates(self) -> bool:
        return not self.purpose


TABLE: dict[str, Kind] = {
    "edm": Kind("sim_jax.convert.edm", "EDM's pickles and state dicts: CIFAR-10, FFHQ, AFHQv2, ImageNet-64 (teachers)"),
    "edm2": Kind("sim_jax.convert.edm2", "EDM2's pickles and state dicts, ImageNet-64 and -512 (teachers)"),
    "sid": Kind("sim_jax.convert.sid", "SiD's network-snapshot-*.pkl (one-step generators, sigma_init 2.5)"),
    "dmd2": Kind("sim_jax.convert.dmd2", "DMD2's ImageNet pytorch_model.bin (one-step generators, sigma_init 80)"),
    "fastgen": Kind("sim_jax.convert.fastgen", "FastGen's *.pth of EDM networks (teachers, or students with sigma_init 80)"),
    "safetensors": Kind("sim_jax.convert.safetensors", "what sim_jax.export writes, or safetensors under EDM's names"),
    "inception": Kind("sim_jax.convert.inception", "FID's Inception-v3: pytorch-fid's and torch-fidelity's *.pth, StyleGAN's .pkl and .pt",
                      purpose="for features"),
    "dit": Kind("sim_jax.convert.dit", "DiT's *.pt, or diffusers' DiTTransformer2DModel (class-conditional teachers on latents)"),
    "pixart": Kind("sim_jax.convert.pixart", "PixArt-alpha's *.pth, or diffusers' PixArtTransformer2DModel (text-conditional teachers)"),
    "sim": Kind("sim_jax.convert.sim", "SIM's released *.pth of PixArt-alpha (one-step text-to-image generator, sigma_init 2.5)"),
    "vae": Kind("sim_jax.convert.vae", "Stable Diffusion's autoencoder, of diffusers or CompVis", purpose="between images and latents"),
}


def read(kind: str, path: str, options: Options = Options()) -> Converted:
    """Reads a checkpoint of another code base, executing nothing in it.

    Raises: ValueError for an unknown kind, or a file that is not of that kind.
    """
    if kind not in TABLE:
        raise ValueError(f"kind: got {kind!r}, allowed: {', '.join(TABLE)}")
    try:
        return importlib.import_module(TABLE[kind].module).read(path, options)
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(path) else f"{path}: {text}") from None
