"""What an objective sees and asks for, as pictures: the training panels.

On held-out images of the generator, at levels that cut its noise-level distribution into equal parts: x_t, the two predictions of x0,
and the gradient of the generator's loss at the image, whose sign says which way each pixel is pushed; its scale per noise level shows
where a method works. With an adversarial term also its gradient, and the discriminator's logits of generated and real images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np

from sim_jax import draws, images, probes, steps
from sim_jax.data.labels import condition
from sim_jax.objectives import adversarial
from sim_jax.objectives.base import Nets, diffuse
from sim_jax.recipe import Recipe
from sim_jax.state import DistillState
from sim_jax.types import Array, Cond, Key, Params

TITLES = {"x_t": "x_t, noise rising downwards", "teacher": "the teacher's x0", "fake_score": "the fake score's x0",
          "gradient": "gradient of the objective at the image (red up, blue down)",
          "gan_gradient": "gradient of the adversarial term at the image"}


def make_panels(recipe: Recipe, sigmas: np.ndarray, *, count: int) -> Callable[..., dict[str, Array]]:
    """`panels(state, teacher_params, key, real, text=None) -> arrays`, pure and to be jitted.

    Args:
      recipe: the run's.
      sigmas: L noise levels.
      count: N images.
    Returns: a function whose `real` is None or {"image": [M,H,W,C], "label": [M]} and captions, and whose `text` has the captions of the N
    generated images, as in `probes.held_out`; its arrays are [N,L,H,W,C] under the names of
    `TITLES`, and with an adversarial term the logits "fake" [N] and "real" [M], each averaged over the heads.
    """
    gan = recipe.adversary

    def panels(state: DistillState, teacher_params: Params, key: Key, real: Mapping[str, Array] | None,
               text: Mapping[str, Array] | None = None) -> dict[str, Array]:
        clean, clean_cond, draw = probes.held_out(recipe, state.generator.params, key, count, text)
        x0, noise, level, cond = probes.at_levels(sigmas, clean, clean_cond, draw)
        teacher, fake = steps.score_networks(recipe, state.fake_score.params, teacher_params)
        heads = None if gan is None else recipe.layout.gather(state.discriminator.params)
        whole = [recipe.layout.gather(p) for p in (state.fake_score.params, teacher_params)]
        nets = Nets(teacher=teacher, fake=fake, discriminate=steps.discriminator(recipe, *whole, heads), memory=state.objective_state)
        _, _, gradient = steps.image_gradient(lambda x: recipe.objective.pair_loss(nets, x, noise, level, cond), x0)
        x_t = diffuse(x0, noise, level)
        out = {"x_t": x_t, "teacher": teacher(x_t, level.sigma, cond), "fake_score": fake(x_t, level.sigma, cond), "gradient": gradient}
        logits = {}
        if gan is not None:
            out["gan_gradient"] = steps.image_gradient(lambda x: adversarial.generator_loss(
                nets.discriminate, x, noise, level, cond, clamp=gan.clamp), x0)[2]
            logits["fake"] = _judge(recipe, nets, key, clean, clean_cond)
            logits["real"] = _judge(recipe, nets, key, real["image"], condition({**real, "class": real["label"]}, recipe.label_dim))
        return {name: a.reshape(count, len(sigmas), *a.shape[1:]) for name, a in out.items()} | logits

    return panels


def _judge(recipe: Recipe, nets: Nets, key: Key, x0: Array, cond: Cond) -> Array:
    """The discriminator's logits [B] of images at noise as in training, averaged over the heads."""
    levels = recipe.adversary.role.noise if recipe.adversary.pairing == "own" else recipe.fake_score.noise
    index = jnp.arange(x0.shape[0], dtype=jnp.uint32)
    noise, level = draws.noise(recipe, levels, key, 0, "panels", index)
    return jnp.mean(nets.discriminate(diffuse(x0, noise, level), level.sigma, cond), axis=1)


def gradient_scales(panels: Mapping[str, np.ndarray], sigmas: np.ndarray) -> dict[str, float]:
    """Mean magnitude of each term's gradient per noise level, by metric name."""
    out = {}
    for name in ("gradient", "gan_gradient"):
        if name in panels:
            scale = np.mean(np.abs(np.asarray(panels[name], np.float64)), axis=(0, *range(2, panels[name].ndim)))
            out |= {f"{name}_scale/sigma{s:.3g}": float(v) for s, v in zip(sigmas.tolist(), scale)}
    return out


def pictures(panels: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One grid a panel, uint8 [H,W,3 or C]: a row per noise level, a column per image."""
    out = {}
    for name in TITLES:
        if name in panels:
            rows = np.moveaxis(np.asarray(panels[name], np.float32), 1, 0)
            shown = _signed(rows) if name.endswith("gradient") else images.to_uint8(images.presentable(rows.reshape(-1, *rows.shape[2:])))
            out[name] = images.grid(shown, columns=rows.shape[1], scale=None)
    return out


def _signed(rows: np.ndarray) -> np.ndarray:
    """[L,N,H,W,C] -> uint8 [L*N,H,W,3]: the mean over channels, red above zero and blue below, white at it; each level by its own scale."""
    mean = rows.mean(axis=-1)
    mean = mean / np.maximum(np.quantile(np.abs(mean), 0.99, axis=(1, 2, 3), keepdims=True), 1e-30)
    mean = np.clip(mean, -1, 1).reshape(-1, *rows.shape[2:4])
    rgb = np.stack([1 + np.minimum(mean, 0), 1 - np.abs(mean), 1 - np.maximum(mean, 0)], axis=-1)
    return np.round(255 * rgb).astype(np.uint8)


def histogram(logits: Mapping[str, np.ndarray], *, size: tuple[int, int] = (480, 240)) -> np.ndarray:
    """The discriminator's logits of real and generated images as a picture, uint8 [H,W,3]."""
    import matplotlib  # here, because it takes a while to import

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(size[0] / 100, size[1] / 100), dpi=100, layout="constrained")
    edges = np.histogram_bin_edges(np.concatenate([logits["real"], logits["fake"]]), bins=30)
    for name, colour in (("real", "#1b9e77"), ("fake", "#d95f02")):
        axes.hist(logits[name], bins=edges, density=True, alpha=0.6, color=colour, label="real" if name == "real" else "generated")
    axes.set_xlabel("discriminator's logit")
    axes.legend(frameon=False)
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
    pyplot.close(figure)
    return pixels
