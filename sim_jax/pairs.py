"""The teacher's (noise, sample) pairs of a regression term: DMD, arXiv 2311.18828, section 4.2.

Pair i is the teacher's deterministic sample from unit noise z_i and class c_i, both functions of (seed, i): the file holds samples and
classes, the noise is drawn again where it is used.
"""

from __future__ import annotations

import pathlib
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from sim_jax import files, processes
from sim_jax.data import pipeline
from sim_jax.data.captions import Captions
from sim_jax.evals.generate import ImageSampler, Latents, SamplerSpec
from sim_jax.networks import Network
from sim_jax.sharding import Layout
from sim_jax.types import Array, Params

FILE_NAME = "pairs.npz"


def _seed(seed: int) -> int:
    """Of the pairs of a run, apart from those of its pictures and figures."""
    return (seed + 0x9E3779B1) % 2**32


def noise(index: Array, *, seed: int, image_shape: tuple[int, int, int]) -> Array:
    """z [B,H,W,C] of pairs `index` [B] of the run with this seed."""
    return Latents(image_shape).noise(jax.random.key(_seed(seed)), index)


def open_pairs(workdir: pathlib.Path, *, count: int, seed: int, network: Network, params: Params, spec: SamplerSpec, latents: Latents,
               layout: Layout, batch_per_device: int, progress: Callable[[int], None] | None = None) -> dict[str, np.ndarray]:
    """The run's pairs {"image": [N,H,W,C] float32, "label": [N] int32}, from its workdir, or drawn and put there.

    Raises: ValueError for a file that holds something else.
    """
    path = workdir / FILE_NAME
    if not processes.agreed(int(path.is_file())):
        sampler = ImageSampler(network, spec, latents, layout=layout, batch_per_device=batch_per_device, finish=np.asarray)
        images, classes = sampler(params, seed=_seed(seed), count=count, progress=progress)
        if jax.process_index() == 0:
            files.write_atomically(path, lambda file: np.savez(file, image=images, label=classes), key="workdir")
        return {"image": images, "label": classes}
    try:
        with np.load(path) as stored:
            out = {name: stored[name] for name in ("image", "label")}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: cannot be read ({error}); delete it to draw the pairs again") from None
    if out["image"].shape != (count, *latents.image_shape) or out["label"].shape != (count,):
        raise ValueError(f"{path}: holds {out['image'].shape}, allowed: {(count, *latents.image_shape)}; delete it to draw the pairs again")
    return out


def batches(pairs: dict[str, np.ndarray], *, seed: int, batch_size: int, start_step: int, rows: np.ndarray,
            captions: Captions | None = None) -> Iterator[dict[str, Any]]:
    """The rows [b] of every step's batch from `start_step` on that this process holds, in an order that is a function of (seed, step).

    `captions` are those of `open_pairs`' latents.
    """
    for step in iter(range(start_step, 1 << 62)):
        index = pipeline.image_order(step * batch_size + np.asarray(rows, np.int64), size=len(pairs["label"]), seed=_seed(seed))
        batch = {"index": index.astype(np.uint32), "image": pairs["image"][index], "label": pairs["label"][index]}
        if captions is not None:
            batch["text"], batch["text_mask"] = captions.text(index % len(captions))
        yield batch
