"""Images from a generator or a teacher, each a function of (seed, index) alone.

Every device always works on the same number of images, padding the last batch, so that one program serves every count, and an
image does not depend on how many others were asked for. Pixels become uint8 on the host, where rounding is the same everywhere.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from sim_jax import images, randomness, sharding
from sim_jax.data import labels as label_streams
from sim_jax.data.captions import Captions
from sim_jax.diffusion import guidance, samplers
from sim_jax.networks import Network
from sim_jax.sharding import Layout
from sim_jax.types import Array, Cond, Key, Params


@dataclasses.dataclass(frozen=True)
class Latents:
    """Where sample i of a seed starts: unit noise, a class, a caption.

    Attributes:
      image_shape: (H, W, C).
      label_dim: 0 for unconditional networks.
      scheme, histogram: of `sim_jax.data.labels`.
      captions: sample i has caption i mod their number; None for networks without text.
    """

    image_shape: tuple[int, int, int]
    label_dim: int = 0
    scheme: str = "uniform"
    histogram: tuple[float, ...] | None = None
    captions: Captions | None = None

    def noise(self, key: Key, index: Array, purpose: str = "sample/z") -> Array:
        """Unit noise [B,H,W,C] for samples `index` [B]; z, or what another purpose draws."""
        return randomness.normal(randomness.sample_keys(key, purpose, index), self.image_shape)

    def classes(self, key: Key, index: Array) -> Array:
        """int32 [B]."""
        draw = label_streams.make(self.scheme, self.label_dim, histogram=self.histogram)
        return draw(randomness.sample_keys(key, "sample/class", index), index)

    def classes_of(self, seed: int, index: np.ndarray) -> np.ndarray:
        return np.asarray(self.classes(jax.random.key(seed), jnp.asarray(index, jnp.uint32)), np.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerSpec:
    """How x is drawn from a denoiser.

    Attributes:
      few_step: the calls of a distilled generator; None follows the diffusion in steps.
      sampler, num_steps, S_churn: of `sim_jax.diffusion.samplers`, where few_step is None.
      guidance, interval: classifier-free guidance, where few_step is None; 1 is none.
      null_text: [1,n,D], the null caption of networks without one of their own.
    """

    few_step: samplers.FewStep | None = None
    sampler: str = "heun"
    num_steps: int = 18
    S_churn: float = 0.0
    guidance: float = 1.0
    interval: tuple[float, float] | None = None
    null_text: np.ndarray | None = dataclasses.field(default=None, compare=False)

    @property
    def calls(self) -> int:
        """Network calls per image; a guided one is two."""
        if self.few_step is not None:
            return len(self.few_step.sigmas)
        return samplers.num_calls(self.sampler, self.num_steps) * (1 if self.guidance == 1 else 2)


class Decode(Protocol):
    """Latents to images, see `ImageSampler`; `image_shape` is that of an image."""

    image_shape: tuple[int, int, int]

    def __call__(self, latents: np.ndarray) -> np.ndarray: ...


class ImageSampler:
    """`sampler(params, seed=..., count=...) -> (images uint8 [count,H,W,C], classes int32 [count])`.

    Args:
      network: whose parameters will be given.
      spec: how to draw.
      latents: where samples start.
      layout: the mesh; images are cut over it.
      batch_per_device: images per device and program.
      finish: float32 [B,H,W,C] -> what is returned for them, on the host; uint8 images by default.
      decode: latents [B,h,w,c] of the network -> images [B,H,W,C], float32 on the host, before `finish`; None: they are images.
    Raises: ValueError for an unknown sampler.
    """

    def __init__(self, network: Network, spec: SamplerSpec, latents: Latents, *, layout: Layout = Layout(),
                 batch_per_device: int = 128, finish: Callable[[np.ndarray], np.ndarray] = images.to_uint8,
                 decode: Decode | None = None):
        self.spec, self.latents, self._finish = spec, latents, finish
        self._text_dim, self._null_caption = network.text_dim, network.text_tokens > 0
        self._decode = decode or (lambda images: images)
        self.image_shape = network.image_shape if decode is None else decode.image_shape
        self._batch = batch_per_device * (1 if layout.mesh is None else layout.mesh.size)

        def start(key: Key, index: Array) -> tuple[Array, Key]:
            return layout.split(latents.noise(key, index)), randomness.sample_keys(key, "sample/churn", index)

        def condition(told: dict[str, Array]) -> Cond:
            return label_streams.condition(layout.split(told), latents.label_dim)

        @jax.jit
        def few_calls(params: Params, key: Key, index: Array, told: dict[str, Array], noise: Array | None = None) -> Array:
            z = start(key, index)[0] if noise is None else layout.split(noise)
            renoise = [layout.split(latents.noise(key, index, f"sample/renoise{k}")) for k in range(1, len(spec.few_step.sigmas))]
            return samplers.few_step(network.bind(layout.gather(params)), z, renoise, condition(told), plan=spec.few_step)

        self._start, self._few_calls = jax.jit(start), few_calls
        if spec.few_step is None:
            limits = (network.precond.sigma_min, network.precond.sigma_max)
            rounding = network.precond.round_sigma if network.precond.tables else None
            sigmas = samplers.edm_sigmas(spec.num_steps, sigma_limits=limits, round_sigma=rounding)
            self._plan = samplers.plan(spec.sampler, sigmas, S_churn=spec.S_churn, round_sigma=rounding)

            @functools.partial(jax.jit, static_argnames="correct")
            def step(params: Params, carry, told: dict[str, Array], keys: Key | None, row, *, correct: bool):
                denoise = guidance.classifier_free(network.bind(layout.gather(params)), w=spec.guidance, interval=spec.interval,
                                                   null_text=spec.null_text)
                take = samplers.make_step(denoise)
                return take(carry, condition(told), keys, row, correct=correct)

            self._step = step

    def _told(self, index: np.ndarray, classes: np.ndarray, text: Captions | None) -> dict[str, Array]:
        """What samples are conditioned on, row by row."""
        text = self.latents.captions if text is None else text
        told = {"class": jnp.asarray(classes, jnp.int32)}
        if text is None:
            if self._text_dim and not self._null_caption:
                raise ValueError("captions: got none, allowed: captions, since the network has no null caption")
            return told
        if not self._text_dim:
            raise ValueError("captions: got some, allowed: none, since the network takes no text")
        states, mask = text.text(np.asarray(index) % len(text))
        if states.shape[2] != self._text_dim:
            raise ValueError(f"captions: got {states.shape[2]} channels ({text.encoder}), allowed: {self._text_dim}")
        return told | {"text": jnp.asarray(states), "text_mask": jnp.asarray(mask)}

    def float_images(self, params: Params, *, seed: int, index: np.ndarray, classes: np.ndarray, noise: np.ndarray | None = None,
                     text: Captions | None = None) -> np.ndarray:
        """One batch, float32 [B,H,W,C]; the length of `index` compiles a program of its own. `noise` replaces the unit noise z, `text` the
        latents' captions."""
        told = self._told(index, classes, text)
        key, index = jax.random.key(seed), jnp.asarray(index, jnp.uint32)
        if self.spec.few_step is not None:
            return self._decode(sharding.to_host(self._few_calls(params, key, index, told, noise)))
        z, keys = self._start(key, index)
        z = z if noise is None else jnp.asarray(noise, z.dtype)

        def step(carry, cond, step_keys, row, *, correct):
            out = self._step(params, carry, told, step_keys, row, correct=correct)
            if jax.default_backend() == "cpu":  # fake devices deadlock when programs queue up
                jax.block_until_ready(out)
            return out

        return self._decode(sharding.to_host(samplers.run(step, z, Cond(), self._plan, keys=keys)))

    def __call__(self, params: Params, *, seed: int, count: int, start: int = 0, classes: Sequence[int] | np.ndarray | None = None,
                 text: Captions | None = None, progress: Callable[[int], None] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Samples start ... start + count - 1 of `seed`.

        Args:
          params: on the layout's devices.
          classes: one per sample; None draws them by (seed, index).
          text: captions, of which sample i has number i mod their number; None: the latents' own or, where there are none, the network's null
            caption.
          progress: called with the number of images done.
        Raises: ValueError for text of another width, for a network that takes none, and without any for one that has no null caption.
        """
        index = np.arange(start, start + count)
        classes = self.latents.classes_of(seed, index) if classes is None else np.asarray(classes, np.int32)
        out = []
        for begin in range(0, count, self._batch):
            here = slice(begin, min(begin + self._batch, count))
            wanted = here.stop - here.start
            pad = np.full(self._batch - wanted, index[here][-1])
            batch = self.float_images(params, seed=seed, text=text, index=np.concatenate([index[here], pad]),
                                      classes=np.concatenate([classes[here], np.full(len(pad), classes[here][-1])]))
            out.append(self._finish(batch[:wanted]))
            if progress is not None:
                progress(here.stop)
        return np.concatenate(out), classes
