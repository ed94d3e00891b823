"""How the published figures were measured, by name: how many images of which seeds, which classes, how pixels were rounded.

    edm     EDM's generate.py and fid.py (Karras et al. 2022): image i of seed i, for 0-49999, 50000-99999 and 100000-149999, classes at
            random; the paper prints the lowest of the three
    sid     SiD and its successors: ten times 50,000 images, classes drawn as often as the data have them; mean and spread
    dmd2    DMD2 on ImageNet 64x64: seed 10, classes in turn, pixels as (x + 1) 127.5 instead of EDM's 127.5 x + 128
    coco    DMD2's text to image: 30,000 captions of COCO 2014's validation set, one image each, cut to a square and resized to 256 by Lanczos,
            against the validation set's images treated alike; the captions and the reference are the user's
    quick   ours, while working: classes as in training; not to be compared with the others

Image i depends on (seed, i). The draws themselves are JAX's and not PyTorch's, so that single images differ from those of the papers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from sim_jax import images
from sim_jax.evals.generate import Latents, SamplerSpec

COCO_SIDE = 256


def _dmd2_uint8(pixels: np.ndarray) -> np.ndarray:
    return ((pixels.astype(np.float32) + 1) * 127.5).clip(0, 255).astype(np.uint8)


def _coco_uint8(pixels: np.ndarray) -> np.ndarray:
    """uint8 [B,256,256,C]: the centre square, resized by Lanczos."""
    def one(image: np.ndarray) -> np.ndarray:
        height, width = image.shape[:2]
        top, left = (height - min(height, width)) // 2, (width - min(height, width)) // 2
        square = Image.fromarray(image[top: top + min(height, width), left: left + min(height, width)].squeeze())
        return np.asarray(square.resize((COCO_SIDE, COCO_SIDE), Image.Resampling.LANCZOS)).reshape(COCO_SIDE, COCO_SIDE, -1)

    return np.stack([one(image) for image in _dmd2_uint8(pixels)])


# name -> (what a report calls it, float32 in [-1, 1] -> uint8; both cut the fraction off)
ROUNDINGS: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "edm": ("clip(x * 127.5 + 128)", images.to_uint8),
    "dmd2": ("clip((x + 1) * 127.5)", _dmd2_uint8),
    "coco": ("clip((x + 1) * 127.5), centre square, Lanczos to 256", _coco_uint8),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
    """How samples are drawn and runs are summed up.

    Attributes:
      name: as in PROTOCOLS.
      count: images of a run.
      seed: of all runs; run k has samples k count ... (k + 1) count - 1.
      repeats: runs.
      label_scheme: of `sim_jax.data.labels`; "trained": as the network was trained; "data": as the reference's labels are distributed.
      rounding: of ROUNDINGS.
      summary: "min" quotes the run with the lowest Frechet distance, "mean" the mean of all.
    """

    name: str
    count: int
    seed: int = 0
    repeats: int = 1
    label_scheme: str = "trained"
    rounding: str = "edm"
    summary: str = "mean"

    def about(self) -> dict[str, Any]:
        """For reports."""
        literal = vars(PROTOCOLS[self.name])
        changed = [f"{key} {value}" for key, value in vars(self).items() if value != literal[key]]
        name = self.name + (f", but with {', '.join(changed)}" if changed else "")
        first = [run * self.count for run in range(self.repeats)]
        return {"protocol": name, "count": self.count, "seed": self.seed, "samples": [f"{i}-{i + self.count - 1}" for i in first],
                "label_scheme": self.label_scheme, "rounding": ROUNDINGS[self.rounding][0], "summary": self.summary}


PROTOCOLS: dict[str, Protocol] = {protocol.name: protocol for protocol in (
    Protocol(name="edm", count=50_000, repeats=3, label_scheme="uniform", summary="min"),
    Protocol(name="sid", count=50_000, repeats=10, label_scheme="data", summary="mean"),
    Protocol(name="dmd2", count=50_000, seed=10, label_scheme="balanced", rounding="dmd2"),
    Protocol(name="coco", count=30_000, rounding="coco"),
    Protocol(name="quick", count=5_000, seed=1),
)}


def get(name: str, *, count: int | None = None, seed: int | None = None) -> Protocol:
    """The protocol called `name`, changed where something is given. Raises: ValueError for an unknown name or a number out of range."""
    if name not in PROTOCOLS:
        raise ValueError(f"protocol: got {name!r}, allowed: {', '.join(PROTOCOLS)}")
    if count is not None and count < 2:
        raise ValueError(f"num: got {count}, allowed: 2 or more")
    if seed is not None and not 0 <= seed < 2**32:
        raise ValueError(f"seed: got {seed}, allowed: 0 to {2**32 - 1}")
    changes = {key: value for key, value in (("count", count), ("seed", seed)) if value is not None}
    return dataclasses.replace(PROTOCOLS[name], **changes)


def check_text(protocol: Protocol, captions: int, *, reference: str | None) -> None:
    """Whether what the protocol takes is there.

    Args:
      captions: how many the network is asked for; 0 where it takes none.
      reference: the images or statistics to compare with, None for none.
    Raises: ValueError for "coco" with fewer captions than images, or without a reference.
    """
    if protocol.name != "coco":
        return
    if captions < protocol.count:
        raise ValueError(f"--protocol: got 'coco' with {captions} captions, allowed: {protocol.count} captions of COCO 2014's validation set, by "
                         "--prompts or --captions (or fewer with --num)")
    if reference is None:
        raise ValueError(f"--reference: got nothing, allowed with --protocol=coco: COCO 2014's validation images, as {COCO_SIDE}x{COCO_SIDE} squares "
                         "in a folder or zip, or their statistics by --write-reference")


def latents(protocol: Protocol, trained: Latents, label_counts: np.ndarray | None = None) -> Latents:
    """Where the protocol's samples start.

    Args:
      trained: as the network was trained.
      label_counts: how often the reference has each class, for "data", which is uniform where that is unknown.
    Raises: ValueError where the reference has more classes than the network.
    """
    if not trained.label_dim or protocol.label_scheme == "trained":
        return trained
    if protocol.label_scheme != "data" or label_counts is None:
        scheme = "uniform" if protocol.label_scheme == "data" else protocol.label_scheme
        return dataclasses.replace(trained, scheme=scheme, histogram=None)
    if len(label_counts) > trained.label_dim:
        raise ValueError(f"reference: got {len(label_counts)} classes, allowed: at most {trained.label_dim}, as the network has")
    histogram = np.pad(label_counts, (0, trained.label_dim - len(label_counts)))
    return dataclasses.replace(trained, scheme="histogram", histogram=tuple(histogram.tolist()))


def describe(spec: SamplerSpec) -> str:
    """A sampler in words: "1 network call at sigma 2.5", "heun, 18 steps, 35 network calls"."""
    calls = f"{spec.calls} network call{'s' if spec.calls > 1 else ''}"
    if spec.few_step is not None:
        return f"{calls} at sigma {', '.join(f'{sigma:g}' for sigma in spec.few_step.sigmas)}"
    churn = f", S_churn {spec.S_churn:g}" if spec.S_churn else ""
    guided = f", guidance {spec.guidance:g}" if spec.guidance != 1 else ""
    return f"{spec.sampler}, {spec.num_steps} steps{churn}{guided}, {calls}"
