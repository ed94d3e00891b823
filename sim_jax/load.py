"""A trained network from wherever it lies: a workdir, a directory of weights, a .safetensors file, or the package itself."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sim_jax import autoencoder, checkpoint, images, networks, optim, param_table, sharding, weights
from sim_jax.data import captions, encoders, labels
from sim_jax.data.captions import Captions
from sim_jax.data.encoders import Encoder
from sim_jax.diffusion.samplers import FewStep
from sim_jax.evals.generate import ImageSampler, Latents, SamplerSpec
from sim_jax.types import Params

_RANDOM = "random:"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Loaded:
    """A network with weights.

    Attributes:
      network: as functions.
      params: float32 numpy tree.
      few_step: a distilled generator's noise levels; None for a denoiser, which samples in steps.
      origin: what to write into reports: path, hash or step, which average.
      labels: `scheme` and `histogram` that it was trained with.
      text_encoder: the name of the text encoder whose captions it was trained with; None where that is not recorded.
    """

    network: networks.Network
    params: Params
    few_step: FewStep | None
    origin: Mapping[str, Any]
    labels: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    text_encoder: str | None = None

    @property
    def sigma_init(self) -> float | None:
        """The first noise level of a distilled generator, G(z) = D(sigma_init z; sigma_init)."""
        return None if self.few_step is None else self.few_step.sigmas[0]

    def latents(self) -> Latents:
        """Where its samples start."""
        return Latents(self.network.image_shape, self.network.label_dim, self.labels.get("scheme", "uniform"),
                       tuple(self.labels.get("histogram", ())) or None)


def few_step_info(plan: FewStep | None) -> dict[str, Any]:
    """How a generator's calls are recorded beside its weights: sigma_init, and sigmas or sigma_cond where there is more to say."""
    if plan is None:
        return {}
    more = {"sigmas": list(plan.sigmas)} if len(plan.sigmas) > 1 else {} if plan.sigma_cond is None else {"sigma_cond": plan.sigma_cond}
    return {"sigma_init": plan.sigmas[0], **more}


def _few_step(header: Mapping[str, Any]) -> FewStep | None:
    if header.get("sigma_init") is None:
        return None
    try:
        return FewStep(tuple(header.get("sigmas") or (header["sigma_init"],)), header.get("sigma_cond"))
    except TypeError:
        raise ValueError(f"sigma_init, sigmas, sigma_cond: got {header['sigma_init']!r}, {header.get('sigmas')!r}, "
                         f"{header.get('sigma_cond')!r}, allowed: numbers above 0") from None


def load(path: str | pathlib.Path, *, ema: str | None = None) -> Loaded:
    """Loads weights.

    Args:
      path: a workdir of `sim_jax.main`, a directory of weights, a .safetensors file, or "builtin:NAME".
      ema: for a workdir, which average: a name such as "ema_500k", or "raw"; None is the first average.
    Raises: ValueError for anything missing, damaged or unknown.
    """
    if (pathlib.Path(path) / "config.json").is_file():
        return _load_workdir(pathlib.Path(path), ema)
    if ema is not None:
        raise ValueError(f"ema: got {ema!r} for {path}, allowed only with a workdir")
    network, params, header = weights.load(str(path))
    origin = {"path": str(path), "hash": header["hash"][:12], **{k: header[k] for k in ("ema", "step") if k in header}}
    return Loaded(network=network, params=params, few_step=_few_step(header), origin=origin, labels=header.get("labels", {}),
                  text_encoder=header.get("text_encoder"))


def load_teacher(path: str, *, ema: str | None, spec: Mapping[str, Any]) -> Loaded:
    """A config's teacher: what `load` takes, or "random:SEED" for weights that nobody trained, of the network `spec`.

    Raises: ValueError as `load` does.
    """
    if not path.startswith(_RANDOM):
        return load(path, ema=ema)
    seed = path.removeprefix(_RANDOM)
    if not seed.isdecimal():
        raise ValueError(f"teacher.path: got {path!r}, allowed: {_RANDOM} and a whole number")
    network = networks.build(spec)
    params = sharding.to_host(jax.jit(network.init)(jax.random.key(int(seed))))
    return Loaded(network=network, params=params, few_step=None, origin={"path": path})


def load_autoencoder(path: str | pathlib.Path, *, dtype: str = "float32") -> tuple[autoencoder.Autoencoder, Params, Mapping[str, Any]]:
    """What `sim_jax.convert --kind=vae` wrote: (functions, float32 numpy tree of views of the file, header with its "hash").

    Raises: ValueError for anything missing, damaged (the content hash is checked) or of another network.
    """
    state, header, source = weights.read(str(path))
    model = autoencoder.build(header["network"], dtype=dtype)
    return model, param_table.from_torch(state, model.shapes(), prefix="", source=source), header


def decoded_shape(path: str | pathlib.Path, spec: Mapping[str, Any], *, key: str = "autoencoder") -> tuple[int, int, int]:
    """(H, W, C) of what the autoencoder in a directory decodes from a network's latents; reads no weights.

    Raises: ValueError, which begins with `key`, where it cannot be read, or makes other latents than those of the network `spec`.
    """
    try:
        model = autoencoder.build(weights.read_header(str(path))["network"])
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{key}: {error}") from None
    for name, got, wanted in (("latents of channels", model.spec["latent_channels"], spec["img_channels"]),
                              ("scaling_factor", model.spec["scaling_factor"], spec.get("scaling_factor", model.spec["scaling_factor"]))):
        if abs(got - wanted) > 1e-6:
            raise ValueError(f"{key}: got {str(path)!r} with {name} {got:g}, allowed: {wanted:g}, as the network {spec['model_type']} has")
    side = spec["img_resolution"] * model.factor
    return (side, side, model.spec["img_channels"])


class Decoder:
    """Latents float32 [N,h,w,c] -> images float32 [N,H,W,C], on the host, by an autoencoder; `image_shape` is (H, W, C).

    Args:
      path: as `load_autoencoder`.
      spec: of the network whose latents they are.
      layout, batch_per_device: images of one program, over the mesh.
      dtype: what the autoencoder computes in.
      key: what messages begin with.
    Raises: ValueError where the autoencoder cannot be read, or makes other latents than the network's.
    """

    def __init__(self, path: str | pathlib.Path, spec: Mapping[str, Any], *, layout: sharding.Layout = sharding.Layout(),
                 batch_per_device: int = 4, dtype: str = "float32", key: str = "autoencoder"):
        self.image_shape = decoded_shape(path, spec, key=key)
        try:
            model, params, _ = load_autoencoder(path, dtype=dtype)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
        self._size = batch_per_device * (1 if layout.mesh is None else layout.mesh.size)
        where = None if layout.mesh is None else jax.tree.map(lambda _: layout.replicated, params)
        self._params = jax.tree.map(jnp.asarray, params) if where is None else sharding.place(params, where)
        self._run = jax.jit(lambda params, latents: model.decode(params, layout.split(latents)))

    def __call__(self, latents: np.ndarray) -> np.ndarray:
        out = []
        for start in range(0, len(latents), self._size):
            part = latents[start: start + self._size]
            padded = np.concatenate([part, np.repeat(part[-1:], self._size - len(part), axis=0)])
            out.append(sharding.to_host(self._run(self._params, jnp.asarray(padded)))[: len(part)])
        return np.concatenate(out)


def _load_workdir(workdir: pathlib.Path, ema: str | None) -> Loaded:
    record = checkpoint.read_json(workdir / "config.json")
    try:
        config, spec = record["config"], record["network"]
        names = optim.ema_names(config["ema"]["halflife_kimg"])
        distils = config["method"] != "dsm"
        plan = _few_step(config["generator"]) if distils else None
    except (KeyError, TypeError):
        raise ValueError(f"{workdir / 'config.json'}: not written by sim_jax.main") from None
    ema = ema or (*names, "raw")[0]
    if ema not in (*names, "raw"):
        raise ValueError(f"ema: got {ema!r}, allowed: {', '.join((*names, 'raw'))}")
    network = networks.build(spec)
    role = "generator" if distils else "fake_score"
    path = (role, "params") if ema == "raw" else (role, "ema", ema)
    step, params = checkpoint.read_tree(workdir / "checkpoints", path, network.shapes())
    return Loaded(network=network, params=sharding.to_host(params), few_step=plan,
                  origin={"path": str(workdir), "step": step, "ema": ema}, labels=config["labels"],
                  text_encoder=record.get("text_encoder"))


@dataclasses.dataclass(frozen=True, eq=False)
class Generator:
    """Draws images: one or a few calls for a distilled generator, Heun's 35 for a teacher.

    Attributes:
      loaded: network and weights.
      sampler: how it draws.
    """

    loaded: Loaded
    sampler: ImageSampler

    def sample(self, num: int | None = None, seed: int = 0, class_labels: Sequence[int] | int | None = None, *,
               text: Captions | None = None, prompts: Sequence[str] | None = None, encoder: Encoder | str | None = None) -> np.ndarray:
        """Samples 0 ... num - 1 of `seed`.

        Args:
          num: how many; None: one per caption.
          seed: image i depends on (seed, i), its class and its caption only.
          class_labels: one class, one per image, or None to draw them.
          text: captions, of which image i has number i mod their number, for a network that takes text; None: its null caption.
          prompts, encoder: instead of `text`, the captions' words and who reads them: an encoder, or what `encoders.open_encoder` takes.
        Returns: uint8 [num,H,W,C]; float32 latents [num,h,w,c] where the network's images are latents and there is no autoencoder.
        Raises: ValueError for a class out of range, a list of another length, or captions that do not fit.
        """
        if prompts is not None:
            if text is not None or encoder is None:
                raise ValueError("prompts: allowed with an encoder, and without text")
            text = captions.encoded(encoders.open_encoder(encoder) if isinstance(encoder, str) else encoder, prompts)
        if text is not None:
            text = captions.fitted(text, width=self.loaded.network.text_dim, tokens=self.loaded.network.text_tokens or None, key="captions")
        num = (100 if text is None else len(text)) if num is None else num
        if num < 1:
            raise ValueError(f"num: got {num}, allowed: 1 or more")
        classes = None
        if class_labels is not None:
            classes = np.full(num, class_labels) if np.ndim(class_labels) == 0 else np.asarray(class_labels)
            classes = labels.check_labels(classes, self.loaded.network.label_dim)
            if len(classes) != num:
                raise ValueError(f"class_labels: got {len(classes)} for {num} images, allowed: one class, or one per image")
        return self.sampler(self._params, seed=seed, count=num, classes=classes, text=text)[0]

    @property
    def _params(self) -> Params:
        return jax.tree.map(jnp.asarray, self.loaded.params)


def load_generator(path: str | pathlib.Path, ema: str | None = None, *, num_steps: int | None = None, batch: int = 128, guidance: float = 1.0,
                   null_text: np.ndarray | None = None, autoencoder: str | pathlib.Path | None = None) -> Generator:
    """A generator ready to sample, from a workdir or a file of weights.

    Args:
      path, ema: as in `load`.
      num_steps: samples in Heun steps (teachers; default 18, which are 35 calls).
      batch: images per device and call.
      guidance, null_text: of teachers, as `SamplerSpec`'s.
      autoencoder: a directory of one, which decodes what the network makes.
    Raises: ValueError as `load` and `Decoder` do.
    """
    loaded = load(path, ema=ema)
    few_step = loaded.few_step if num_steps is None else None
    spec = SamplerSpec(few_step=few_step) if few_step else SamplerSpec(num_steps=num_steps or 18, guidance=guidance, null_text=null_text)
    decode = None if autoencoder is None else Decoder(autoencoder, loaded.network.spec)
    plain = decode is None and loaded.network.image_shape[2] not in (1, 3)
    return Generator(loaded, ImageSampler(loaded.network, spec, loaded.latents(), batch_per_device=batch, decode=decode,
                                          finish=np.asarray if plain else images.to_uint8))
