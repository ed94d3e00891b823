"""Pictures of what a run has learned, as arrays: for notebooks.

    run = gallery.open_run("runs/digits")                         generator and teacher, ready to sample
    left, right = gallery.same_noise(run, 20)                     teacher and generator from the same noise and classes
    strip = gallery.interpolation(run, pairs=4)                   along great circles of the noise
    grid = gallery.per_class(run, each=8)                         classes x samples

All images are uint8 [..., H, W, C], and functions of the seed.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sim_jax import images, load, saved
from sim_jax.evals.generate import ImageSampler, SamplerSpec
from sim_jax.load import Loaded
from sim_jax.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Drawn:
    """A network and how it is drawn from."""

    loaded: Loaded
    sampler: ImageSampler
    params: Params

    def images(self, count: int, seed: int, classes: np.ndarray, noise: np.ndarray | None = None) -> np.ndarray:
        """uint8 [count,H,W,C]: samples 0 ... count - 1 of `seed`, or those of other noise [count,H,W,C]."""
        pixels = self.sampler.float_images(self.params, seed=seed, index=np.arange(count), classes=classes, noise=noise)
        return images.to_uint8(np.asarray(pixels))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """A workdir's networks.

    Attributes:
      generator: what was distilled; of a teacher's own run that teacher.
      teacher: what it was distilled from; None of a teacher's own run.
      about: step, average, method, for titles.
    """

    generator: Drawn
    teacher: Drawn | None
    about: dict[str, Any]

    @property
    def label_dim(self) -> int:
        return self.generator.loaded.network.label_dim


def open_run(workdir: str | pathlib.Path, *, ema: str | None = None, teacher_steps: int | None = None) -> Run:
    """Generator and teacher of a workdir.

    Args:
      ema: which average; None is the first, "raw" the parameters themselves.
      teacher_steps: of the teacher's sampler; None as the run's config says.
    Raises: ValueError for a workdir without config.json or checkpoints, or a teacher that is gone.
    """
    path = pathlib.Path(workdir)
    if not (path / "config.json").is_file():
        raise ValueError(f"workdir: got {str(workdir)!r}, which has no config.json; allowed: the workdir of a run")
    record = saved.read_json(path / "config.json")
    if record["network"]["img_resolution"] == 1:
        raise ValueError(f"workdir: got {str(workdir)!r}, whose samples are points; allowed: images (report.html shows points)")
    config, section = record["config"], record["config"]["teacher"]
    # Runs of earlier versions know no guidance.
    spec = SamplerSpec(sampler=section["sampler"], num_steps=teacher_steps or section["num_steps"], guidance=section.get("guidance", 1.0),
                       interval=tuple(section.get("guidance_interval", ())) or None)
    loaded = load.load(path, ema=ema)
    generator = _drawn(loaded, SamplerSpec(few_step=loaded.few_step) if loaded.few_step else spec)
    teacher = None
    if config["method"] != "dsm":
        teacher = _drawn(load.load_teacher(section["path"], ema=section["ema"], spec=record["network"]), spec)
    return Run(generator=generator, teacher=teacher, about={"method": config["method"], **loaded.origin})


def _drawn(loaded: Loaded, spec: SamplerSpec) -> Drawn:
    sampler = ImageSampler(loaded.network, spec, loaded.latents())
    return Drawn(loaded=loaded, sampler=sampler, params=jax.tree.map(jnp.asarray, loaded.params))


def _classes(run: Run, count: int) -> np.ndarray:
    """The classes in turn."""
    return np.arange(count) % run.label_dim if run.label_dim else np.zeros(count, np.int64)


def same_noise(run: Run, count: int, *, seed: int = 0, classes: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(the teacher's, the generator's) samples [count,H,W,C] from the same noise and classes (default: in turn).

    Raises: ValueError for a run without a teacher.
    """
    if run.teacher is None:
        raise ValueError(f"workdir: got the run of a teacher ({run.about['path']}), allowed: a distillation")
    classes = _classes(run, count) if classes is None else np.asarray(classes)
    return run.teacher.images(count, seed, classes), run.generator.images(count, seed, classes)


def great_circle(a: np.ndarray, b: np.ndarray, fractions: np.ndarray) -> np.ndarray:
    """Unit noise from `a` to `b` [..., H,W,C] by angle, [..., len(fractions), H,W,C]: Gaussian noise keeps its length on the way."""
    axes = tuple(range(a.ndim - 3, a.ndim))
    lengths = np.linalg.norm(a.reshape(*a.shape[:-3], -1), axis=-1) * np.linalg.norm(b.reshape(*b.shape[:-3], -1), axis=-1)
    angle = np.arccos(np.clip(np.sum(a * b, axis=axes) / lengths, -1, 1))[..., None, None, None, None]
    t = np.asarray(fractions, np.float64).reshape(-1, 1, 1, 1)
    a, b = a[..., None, :, :, :], b[..., None, :, :, :]
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.maximum(np.sin(angle), 1e-12)


def interpolation(run: Run, *, pairs: int = 4, steps: int = 9, seed: int = 0, teacher: bool = False) -> np.ndarray:
    """[pairs,steps,H,W,C]: from sample 2i of `seed` to sample 2i + 1, both of one class (the i-th)."""
    drawn = run.teacher if teacher else run.generator
    if drawn is None:
        raise ValueError(f"workdir: got the run of a teacher ({run.about['path']}), allowed: a distillation")
    ends = np.asarray(drawn.loaded.latents().noise(jax.random.key(seed), jnp.arange(2 * pairs, dtype=jnp.uint32)))
    way = great_circle(ends[::2], ends[1::2], np.linspace(0, 1, steps)).astype(np.float32)
    pixels = drawn.images(pairs * steps, seed, np.repeat(_classes(run, pairs), steps), way.reshape(-1, *way.shape[2:]))
    return pixels.reshape(pairs, steps, *pixels.shape[1:])


def per_class(run: Run, *, each: int = 8, most: int = 20, seed: int = 0, teacher: bool = False) -> np.ndarray:
    """[classes,each,H,W,C] of the first `most` classes; the j-th column has the same noise everywhere. One row without classes."""
    drawn = run.teacher if teacher else run.generator
    if drawn is None:
        raise ValueError(f"workdir: got the run of a teacher ({run.about['path']}), allowed: a distillation")
    rows = min(run.label_dim, most) or 1
    noise = np.asarray(drawn.loaded.latents().noise(jax.random.key(seed), jnp.arange(each, dtype=jnp.uint32)))
    pixels = drawn.images(rows * each, seed, np.repeat(np.arange(rows), each), np.tile(noise, (rows, 1, 1, 1)))
    return pixels.reshape(rows, each, *pixels.shape[1:])
