"""From a network's description to pure functions: `build(spec) -> Network`.

A description is the keyword arguments of EDM's preconditioner classes plus `precond`, the class: what `network.json` holds,
what EDM's checkpoints carry and what a config's `network` section says. For instance

    {"precond": "EDMPrecond", "model_type": "SongUNet", "img_resolution": 32, "img_channels": 3, "label_dim": 10, ...}
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sim_jax.diffusion import preconditioners
from sim_jax.models.adm import DhariwalUNet
from sim_jax.models.song_unet import SongUNet
from sim_jax.types import Array, Cond, DenoiseFn, Key, Params

_MODELS = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}
_OURS = ("in_channels", "out_channels", "dtype", "remat", "parent", "name")  # module fields that a description does not set
_CHOICES = {
    "embedding_type": ("positional", "fourier"),
    "encoder_type": ("standard", "skip", "residual"),
    "decoder_type": ("standard", "skip"),
}
# What does not change the function that a network computes at evaluation, so two descriptions may differ in it.
_TRAINING_ONLY = ("dropout", "label_dropout", "use_fp16")


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """A preconditioned denoiser as functions of its parameters.

    Attributes:
      spec: the description it was built from, defaults filled in.
      precond: its preconditioner.
      module: the flax module of the raw network F.
      dtype: what F computes in; parameters, input and output are float32.
    """

    spec: Mapping[str, Any]
    precond: preconditioners.Preconditioner
    module: Any
    dtype: Any

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        res = self.spec["img_resolution"]
        return (res, res, self.spec["img_channels"])

    @property
    def label_dim(self) -> int:
        return self.spec["label_dim"]

    @property
    def augment_dim(self) -> int:
        return self.spec["augment_dim"]

    def init(self, key: Key) -> Params:
        """Random parameters, float32, under the PyTorch names."""
        x = jnp.zeros((1, *self.image_shape))
        labels, augment = jnp.zeros((1, self.label_dim)), jnp.zeros((1, self.augment_dim))
        return self.module.init(key, x, jnp.zeros((1,)), labels, augment)["params"]

    def shapes(self) -> Params:
        """The tree of `init`, as ShapeDtypeStructs; computes nothing."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def denoise(self, params: Params, x: Array, sigma: Array, cond: Cond = Cond(), *, dropout_keys: Key | None = None) -> Array:
        """D(x; sigma), equation 7 of EDM.

        Args:
          params: as from `init`.
          x: [B,H,W,C], x_0 + sigma n.
          sigma: [B].
          cond: labels; absent ones count as zeros, which EDM's networks read as "no label".
          dropout_keys: [B] keys to train with dropout; None evaluates.
        Returns: [B,H,W,C] float32.
        """
        x, sigma = x.astype(jnp.float32), sigma.astype(jnp.float32)
        c_skip, c_out, c_in, c_noise = (c if c.ndim == 1 else c.reshape(-1) for c in self.precond.coefficients(sigma))
        batch = x.shape[0]
        labels = jnp.zeros((batch, self.label_dim)) if cond.class_labels is None else cond.class_labels
        augment = jnp.zeros((batch, self.augment_dim)) if cond.augment_labels is None else cond.augment_labels
        raw = self.module.apply(
            {"params": params}, (c_in[:, None, None, None] * x).astype(self.dtype), c_noise, labels, augment, dropout_keys)
        raw = raw[..., : x.shape[-1]].astype(jnp.float32)
        return c_skip[:, None, None, None] * x + c_out[:, None, None, None] * raw

    def bind(self, params: Params, *, dropout_keys: Key | None = None) -> DenoiseFn:
        """The DenoiseFn of these parameters."""
        return lambda x, sigma, cond: self.denoise(params, x, sigma, cond, dropout_keys=dropout_keys)

    def num_params(self) -> int:
        """Trainable numbers; buffers (the Fourier frequencies) are not counted, as in EDM's figures."""
        leaves = jax.tree_util.tree_leaves_with_path(self.shapes())
        return sum(math.prod(leaf.shape) for path, leaf in leaves if path[-1].key != "freqs")


def full_spec(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Checks a description and fills in defaults.

    Raises: ValueError naming the key, what came and what is allowed.
    """
    spec = {k: tuple(v) if isinstance(v, list) else v for k, v in spec.items()}
    model_type = spec.get("model_type", "DhariwalUNet")
    if model_type not in _MODELS:
        raise ValueError(f"network.model_type: got {model_type!r}, allowed: {', '.join(_MODELS)}")
    fields = {f.name: f.default for f in dataclasses.fields(_MODELS[model_type]) if f.name not in _OURS}
    out = {"precond": "EDMPrecond", "model_type": model_type, "img_channels": 3, "use_fp16": False}
    allowed = [*out, *fields, *preconditioners.arguments(spec.get("precond", "EDMPrecond"))]
    for key in spec:
        if key not in allowed:
            close = difflib.get_close_matches(key, allowed, 1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(f"network.{key}: unknown{hint}, allowed: {', '.join(sorted(allowed))}")
    if "img_resolution" not in spec:
        raise ValueError("network.img_resolution: missing, it must be an integer, e.g. 32")
    out.update({k: v for k, v in fields.items() if k != "img_resolution"})
    out.update(spec)
    for key, choices in _CHOICES.items():
        if key in fields and out[key] not in choices:
            raise ValueError(f"network.{key}: got {out[key]!r}, allowed: {', '.join(choices)}")
    deepest = 1 << (len(out["channel_mult"]) - 1)
    if out["img_resolution"] % deepest or out["img_resolution"] < deepest:
        raise ValueError(f"network.img_resolution: got {out['img_resolution']}, it must be a multiple of {deepest}, "
                         f"since channel_mult has {len(out['channel_mult'])} resolutions")
    return out


def differences(spec: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The keys in which two descriptions name different functions, as "key: a != b"."""
    a, b = full_spec(spec), full_spec(other)
    keys = sorted((a.keys() | b.keys()) - set(_TRAINING_ONLY))
    return [f"{k}: {a.get(k)!r} != {b.get(k)!r}" for k in keys if a.get(k) != b.get(k)]


def build(spec: Mapping[str, Any], *, dtype: str = "float32", remat: bool = False, dropout: float | None = None) -> Network:
    """Builds the network that `spec` describes.

    Args:
      spec: EDM's constructor arguments and `precond`.
      dtype: what the raw network computes in, "float32" or "bfloat16". Parameters stay float32.
      remat: recompute blocks in the backward pass, for memory.
      dropout: replaces the description's dropout where given.
    Raises: ValueError for anything that the description should not hold.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype: got {dtype!r}, allowed: float32, bfloat16")
    spec = full_spec(spec)
    if dropout is not None:
        spec["dropout"] = dropout
    precond = preconditioners.make(
        spec["precond"], **{k: spec[k] for k in preconditioners.arguments(spec["precond"]) if k in spec})
    cls = _MODELS[spec["model_type"]]
    kwargs = {f.name: spec[f.name] for f in dataclasses.fields(cls) if f.name in spec}
    module = cls(in_channels=spec["img_channels"], out_channels=spec["img_channels"] * precond.out_factor,
                 dtype=jnp.dtype(dtype), remat=remat, **kwargs)
    return Network(spec=spec, precond=precond, module=module, dtype=jnp.dtype(dtype))
