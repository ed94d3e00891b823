"""What an iteration is made of, all of it static: the networks' roles, the terms of the losses, where the arrays lie."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import optax

from sim_jax.diffusion.samplers import FewStep
from sim_jax.discriminator import Discriminator
from sim_jax.networks import Network
from sim_jax.objectives.base import Objective
from sim_jax.sharding import Layout
from sim_jax.types import Array, Key, NoiseLevel, Params

Levels = Callable[[Key], NoiseLevel]  # per-sample keys [B] -> entries [B]
IMAGES = ("fresh", "shared")
PAIRINGS = ("own", "score", "shared")
FEATURES = ("fake_score", "teacher")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Role:
    """How one trained network moves.

    Attributes:
      network: as functions of its parameters.
      optimizer: its optax chain.
      noise: the levels that its loss is taken at.
      shardings: of its parameters, None on one device.
    """

    network: Network | Discriminator
    optimizer: optax.GradientTransformation
    noise: Levels
    shardings: Params | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adversary:
    """The adversarial term, for any objective.

    Attributes:
      role: the discriminator's heads; `noise` is where "own" images are judged.
      features: whose features they read: "fake_score", which then moves by the discriminator's loss too, or "teacher", frozen.
      weight: of the term in the generator's loss.
      critic_weight: of the discriminator's loss in the critic's.
      critic_weighting: of that loss by the generated image's noise level, sigma [B] -> [B]; None for 1.
      pairing: at which noise images are judged: "own" draws for every image (DMD2's diffusion GAN); "score": generated images are those
        x_t that the score losses use, real ones draw theirs alike; "shared": and real images take the generated ones' noise (SiDA).
      clamp: of the logits, None for none.
      start_images: images per update that pass before the term moves the generator.
    """

    role: Role
    features: str = "fake_score"
    weight: float = 0.0
    critic_weight: float = 1.0
    critic_weighting: Callable[[Array], Array] | None = None
    pairing: str = "own"
    clamp: float | None = None
    start_images: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regression:
    """The regression term on the teacher's (noise, sample) pairs, for any objective (DMD).

    Attributes:
      weight: of the term in the generator's loss.
      loss: (x0, target, features of both or None) -> (loss [B], metrics).
      noise: index [B] -> z [B,H,W,C], what the teacher's sample of that index started from.
      resolutions: of the teacher's feature maps that a perceptual loss compares.
    """

    weight: float
    loss: Callable[..., tuple[Array, dict[str, Array]]]
    noise: Callable[[Array], Array]
    resolutions: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guidance:
    """Classifier-free guidance inside the objective: `w` = 1 is none; `interval` (sigma_lo, sigma_hi) of the teacher's; `null_text` [1,n,D]
    of networks without a null caption of their own."""

    teacher: float = 1.0
    fake_score: float = 1.0
    interval: tuple[float, float] | None = None
    null_text: Array | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything static of an iteration.

    Attributes:
      objective: pair and critic losses.
      generator: None where a teacher is trained.
      fake_score: the critic, or the teacher in training.
      teacher: None where a teacher is trained.
      adversary, regression: terms beside the objective's, None for none.
      guidance: of the score networks in the generator's loss.
      labels: (keys [B], index [B]) -> class [B] int32; unused where data brings labels.
      augment: (keys [B], images) -> (images, labels [B, augment_dim]), for the critic's images; None does nothing.
      batch_size: images per update, over all devices.
      micro_batches: how many pieces an update's batch is cut into.
      loop: "python" unrolls the pieces, "scan" compiles one (convolutions in loops are slow on CPUs).
      plan: the generator's noise levels.
      inputs: of `rollout.INPUTS`: what a few-step generator is fed in training.
      images: "fresh" noise for each of the two updates, or "shared": the same images, whose forward pass the compiler then merges.
      ema: `halflife_kimg` and `rampup` of `optim.update_ema`.
      layout: where the arrays lie.
    """

    objective: Objective
    fake_score: Role
    generator: Role | None = None
    teacher: Network | None = None
    adversary: Adversary | None = None
    regression: Regression | None = None
    guidance: Guidance = Guidance()
    labels: Callable[[Key, Array], Array] | None = None
    augment: Callable[[Key, Array], tuple[Array, Array]] | None = None
    batch_size: int
    micro_batches: int = 1
    loop: str = "python"
    plan: FewStep = FewStep()
    inputs: str = "simulated"
    images: str = "fresh"
    ema: Mapping[str, Any]
    layout: Layout = Layout()

    @property
    def label_dim(self) -> int:
        return self.fake_score.network.label_dim

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.fake_score.network.image_shape
