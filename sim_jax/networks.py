"""From a network's description to pure functions: `build(spec) -> Network`.

A description is the keyword arguments of EDM's or EDM2's preconditioner classes plus `precond`, the class, and `model_type`,
the raw network's: what `network.json` holds and what a config's `network` section says. "DDPMPrecond" takes transformers, under their
own names. For instance

    {"precond": "EDMPrecond", "model_type": "SongUNet", "img_resolution": 32, "img_channels": 3, "label_dim": 10, ...}
    {"precond": "Precond", "model_type": "EDM2UNet", "img_resolution": 64, "img_channels": 4, "label_dim": 1000, ...}
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sim_jax.diffusion import preconditioners
from sim_jax.models import edm2, gaussian_mixture, memory, transformer
from sim_jax.models.adm import DhariwalUNet
from sim_jax.models.dit import DiT
from sim_jax.models.mlp import MLP
from sim_jax.models.pixart import PixArt
from sim_jax.models.song_unet import SongUNet
from sim_jax.types import Array, Cond, DenoiseFn, Key, Params


class Family(NamedTuple):
    """What one public code base offers, or we do: preconditioners and the raw networks that they take.

    Attributes:
      preconds, models: by class name; the first of each is the default.
      defaults: of the preconditioner's arguments that are neither the network's nor its formula's.
      prefix: of names in a state dict, in front of the tree's: the attribute under which the preconditioner keeps the network.
      complete: of a checked description, the arguments whose defaults follow from others.
      project: parameters -> parameters, onto the set that training keeps them in.
      dtypes: what the raw networks can compute in.
    """

    preconds: tuple[str, ...]
    models: Mapping[str, Any]
    defaults: Mapping[str, Any]
    prefix: str = ""
    complete: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda spec: {}
    project: Callable[[Params], Params] = lambda params: params
    dtypes: tuple[str, ...] = ("float32", "bfloat16")


_FAMILIES = (
    Family(("EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond"),
           {"DhariwalUNet": DhariwalUNet, "SongUNet": SongUNet, "MLP": MLP}, {"img_channels": 3, "use_fp16": False}, prefix="model."),
    Family(("Precond",), {"EDM2UNet": edm2.EDM2UNet}, {"img_channels": 3, "use_fp16": True}, complete=edm2.complete,
           project=edm2.project),
    Family(("DDPMPrecond",), {"DiT": DiT, "PixArt": PixArt}, {"img_channels": 4, "label_dim": 0}, complete=transformer.complete),
    Family(("Analytic",), {"GaussianMixture": gaussian_mixture.GaussianMixture}, {"img_channels": 3}, prefix="model.",
           complete=gaussian_mixture.complete, dtypes=("float32",)),
)
_OURS = ("in_channels", "out_channels", "dtype", "remat", "parent", "name")  # module fields that a description does not set
_CHOICES = {
    "embedding_type": ("positional", "fourier"),
    "encoder_type": ("standard", "skip", "residual"),
    "decoder_type": ("standard", "skip"),
}
_FRACTIONS = ("label_balance", "concat_balance", "res_balance", "attn_balance")
_SMALLEST = {"img_resolution": 1, "img_channels": 1, "label_dim": 0, "augment_dim": 0, "model_channels": 4, "channel_mult_emb": 1,
             "channel_mult_noise": 1, "num_blocks": 1, "channels_per_head": 1, "logvar_channels": 1, "num_components": 1, "rank": 0,
             "input_frequencies": 0}
_BUFFERS = ("freqs", "phases")  # leaves of the tree that are not trained
# What does not change the function that a network computes at evaluation, so two descriptions may differ in it. The limits on
# sigma are where samplers stop; some checkpoints set them and some do not.
_TRAINING_ONLY = ("dropout", "label_dropout", "use_fp16", "sigma_min", "sigma_max")


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """A preconditioned denoiser as functions of its parameters.

    Attributes:
      spec: the description it was built from, defaults filled in.
      precond: its preconditioner.
      module: the flax module of the raw network F.
      dtype: what F computes in; parameters, input and output are float32.
      family: where its names and its training come from.
      gather: where parameters are cut over devices, what makes one of them whole right before its layer uses it; None elsewhere.
    """

    spec: Mapping[str, Any]
    precond: preconditioners.Preconditioner
    module: Any
    dtype: Any
    family: Family
    gather: memory.Gather | None = None

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
        return self.spec["augment_dim"] if "augment_dim" in self.spec else 0

    @property
    def text_dim(self) -> int:
        """Channels of the captions that it takes; 0: none."""
        return self.spec["caption_channels"] if "caption_channels" in self.spec else 0

    @property
    def text_tokens(self) -> int:
        """Length of its null caption, and so of all its captions; 0: any."""
        return self.spec["caption_tokens"] if "caption_tokens" in self.spec else 0

    def init(self, key: Key) -> Params:
        """Random parameters, float32, under the PyTorch names."""
        x = jnp.zeros((1, *self.image_shape))
        labels, augment = jnp.zeros((1, self.label_dim)), jnp.zeros((1, self.augment_dim))
        return self.project(self.module.init(key, x, jnp.zeros((1,)), labels, augment)["params"])

    def project(self, params: Params) -> Params:
        """What training does to parameters after every update: EDM2's go back to magnitude one, EDM's stay as they are."""
        return self.family.project(params)

    def shapes(self) -> Params:
        """The tree of `init`, as ShapeDtypeStructs; computes nothing."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def denoise(self, params: Params, x: Array, sigma: Array, cond: Cond = Cond(), *, dropout_keys: Key | None = None) -> Array:
        """D(x; sigma), equation 7 of EDM.

        Args:
          params: as from `init`.
          x: [B,H,W,C], x_0 + sigma n.
          sigma: [B].
          cond: labels; absent ones count as zeros, which EDM's networks read as "no label". Absent text is the null caption.
          dropout_keys: [B] keys to train with dropout; None evaluates.
        Returns: [B,H,W,C] float32.
        """
        raw = self._raw(params, x, sigma, cond, dropout_keys)[..., : x.shape[-1]].astype(jnp.float32)
        c_skip, c_out = (c.reshape(-1, 1, 1, 1) for c in self.precond.coefficients(sigma.astype(jnp.float32))[:2])
        return c_skip * x.astype(jnp.float32) + c_out * raw

    def features(self, params: Params, x: Array, sigma: Array, cond: Cond = Cond(), *, resolutions: Sequence[int] = (),
                 dropout_keys: Key | None = None) -> list[Array]:
        """What the encoder hands to the decoder: the output of its last block at each of `resolutions`. The decoder is not computed.

        Args:
          params, x, sigma, cond, dropout_keys: as in `denoise`; the same ones in the same jit share the encoder with it.
          resolutions: of the maps, in the order wanted; () is the lowest alone.
        Returns: [B,r,r,C] float32 for each resolution r.
        Raises: ValueError for resolutions that the encoder does not have.
        """
        wanted = [r for r, _, _ in self.feature_shapes(resolutions)]
        maps = self._raw(params, x, sigma, cond, dropout_keys, encode_only=True)
        found = dict(zip(self.module.feature_channels, maps, strict=True))
        return [found[r].astype(jnp.float32) for r in wanted]

    def feature_shapes(self, resolutions: Sequence[int] = ()) -> list[tuple[int, int, int]]:
        """The shapes (r, r, C) of one sample's `features`. Raises: ValueError as there."""
        channels = getattr(self.module, "feature_channels", {})
        wanted = tuple(resolutions) or tuple(channels)[-1:]
        if not wanted or len(set(wanted)) < len(wanted) or not set(wanted) <= channels.keys():
            allowed = f"different ones of {', '.join(map(str, channels))}" if channels else f"none with {self.spec['model_type']}"
            raise ValueError(f"gan.resolutions: got {tuple(resolutions)}, allowed: {allowed}")
        return [(r, r, channels[r]) for r in wanted]

    def _raw(self, params: Params, x: Array, sigma: Array, cond: Cond, dropout_keys: Key | None, **how: Any) -> Any:
        """F(c_in x; c_noise)."""
        _, _, c_in, c_noise = self.precond.coefficients(sigma.astype(jnp.float32))
        x = (c_in.reshape(-1, 1, 1, 1) * x.astype(jnp.float32)).astype(self.dtype)
        batch = x.shape[0]
        labels = jnp.zeros((batch, self.label_dim)) if cond.class_labels is None else cond.class_labels
        augment = jnp.zeros((batch, self.augment_dim)) if cond.augment_labels is None else cond.augment_labels
        if self.text_dim:
            how = {"text": cond.text, "text_mask": cond.text_mask, **how}
        elif cond.text is not None:
            raise ValueError(f"cond.text: got text, allowed with {self.spec['model_type']}: None")
        with memory.gathering(self.gather):
            return self.module.apply({"params": params}, x, c_noise.reshape(-1), labels, augment, dropout_keys, **how)

    def bind(self, params: Params, *, dropout_keys: Key | None = None) -> DenoiseFn:
        """The DenoiseFn of these parameters."""
        return lambda x, sigma, cond: self.denoise(params, x, sigma, cond, dropout_keys=dropout_keys)

    def num_params(self) -> int:
        """Trainable numbers; buffers (Fourier frequencies and phases) are not counted, as in EDM's figures."""
        leaves = jax.tree_util.tree_leaves_with_path(self.shapes())
        return sum(math.prod(leaf.shape) for path, leaf in leaves if path[-1].key not in _BUFFERS)


def family_of(spec: Mapping[str, Any]) -> Family:
    """The family that a description's `precond` and `model_type` belong to; EDM's where it gives neither.

    Raises: ValueError for a name that no family has, or two names of different families.
    """
    given = {key: spec[key] for key in ("precond", "model_type") if key in spec}
    offers = [{"precond": family.preconds, "model_type": tuple(family.models)} for family in _FAMILIES]
    for key, name in given.items():
        allowed = [n for offer in offers for n in offer[key]]
        if name not in allowed:
            raise ValueError(f"network.{key}: got {name!r}, allowed: {', '.join(allowed)}")
    for family, offer in zip(_FAMILIES, offers, strict=True):
        if all(name in offer[key] for key, name in given.items()):
            return family
    allowed = next(offer["model_type"] for offer in offers if given["precond"] in offer["precond"])
    raise ValueError(f"network.model_type: got {given['model_type']!r} with precond {given['precond']!r}, "
                     f"allowed: {', '.join(allowed)}")


def full_spec(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Checks a description and fills in defaults.

    Raises: ValueError naming the key, what came and what is allowed.
    """
    spec = {k: tuple(v) if isinstance(v, list) else v for k, v in spec.items()}
    family = family_of(spec)
    out = {"precond": family.preconds[0], "model_type": next(iter(family.models)), **family.defaults}
    out.update({key: spec[key] for key in ("precond", "model_type") if key in spec})
    fields = {f.name: f.default for f in dataclasses.fields(family.models[out["model_type"]]) if f.name not in _OURS}
    allowed = [*out, *fields, *preconditioners.arguments(out["precond"])]
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
    for key in _FRACTIONS:
        if key in fields and not 0 <= out[key] <= 1:
            raise ValueError(f"network.{key}: got {out[key]!r}, allowed: from 0 to 1")
    _check_values(out)
    return out | family.complete(out)


def _check_values(spec: Mapping[str, Any]) -> None:
    """Refuses what no network can be built from, and what would otherwise fail deep inside a layer."""

    def refuse(key: str, words: str) -> None:
        raise ValueError(f"network.{key}: got {spec[key]!r}, allowed: {words}")

    def whole(value: Any, low: int) -> bool:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= low

    for key, low in _SMALLEST.items():
        if spec.get(key) is not None and not whole(spec[key], low):
            refuse(key, f"a whole number from {low}")
    for key in ("dropout", "label_dropout"):
        if key in spec and not (isinstance(spec[key], numbers.Real) and 0 <= spec[key] < 1):
            refuse(key, "from 0 to 1 (exclusive)")
    for key, empty in (("channel_mult", False), ("attn_resolutions", True)):
        if key in spec and (not isinstance(spec[key], tuple) or not all(whole(n, 1) for n in spec[key]) or not (spec[key] or empty)):
            refuse(key, "a list of whole numbers from 1")
    deepest = 1 << (len(spec["channel_mult"]) - 1) if "channel_mult" in spec else 1
    if spec["img_resolution"] % deepest:
        raise ValueError(f"network.img_resolution: got {spec['img_resolution']}, it must be a multiple of {deepest}, "
                         f"since channel_mult has {len(spec['channel_mult'])} resolutions")
    taps = spec["resample_filter"] if "resample_filter" in spec else (1, 1)
    if not isinstance(taps, tuple) or not taps or len(taps) % 2 or not sum(taps) > 0:
        refuse("resample_filter", "an even number of taps with a sum above 0, such as (1, 3, 3, 1)")


def differences(spec: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The keys in which two descriptions name different functions, as "key: a != b"."""
    a, b = ({**preconditioners.defaults(s["precond"]), **s} for s in (full_spec(spec), full_spec(other)))
    keys = sorted((a.keys() | b.keys()) - set(_TRAINING_ONLY))
    return [f"{k}: {a.get(k)!r} != {b.get(k)!r}" for k in keys if a.get(k) != b.get(k)]


def build(spec: Mapping[str, Any], *, dtype: str = "float32", remat: str = "none", dropout: float | None = None) -> Network:
    """Builds the network that `spec` describes.

    Args:
      spec: constructor arguments, `precond` and `model_type`.
      dtype: what the raw network computes in, "float32" or "bfloat16". Parameters stay float32.
      remat: what blocks keep for the backward pass, of `memory.POLICIES`.
      dropout: replaces the description's dropout where given.
    Raises: ValueError for anything that the description should not hold.
    """
    spec = full_spec(spec if dropout is None else {**spec, "dropout": dropout})
    family = family_of(spec)
    for key, got, allowed in (("dtype", dtype, family.dtypes), ("remat", remat, memory.POLICIES)):
        if got not in allowed:
            raise ValueError(f"{key}: got {got!r}, allowed: {', '.join(allowed)}")
    precond = preconditioners.make(
        spec["precond"], **{k: spec[k] for k in preconditioners.arguments(spec["precond"]) if k in spec})
    cls = family.models[spec["model_type"]]
    kwargs = {f.name: spec[f.name] for f in dataclasses.fields(cls) if f.name in spec}
    module = cls(in_channels=spec["img_channels"], out_channels=spec["img_channels"] * precond.out_factor,
                 dtype=jnp.dtype(dtype), remat=remat, **kwargs)
    return Network(spec=spec, precond=precond, module=module, dtype=jnp.dtype(dtype), family=family)
