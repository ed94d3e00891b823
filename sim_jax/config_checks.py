"""What a config's values may be: every key with a range or a short list of words, checked before anything is built.

Names and knobs that belong to a table (methods, distances, noise levels, data sources) are checked where the table is.
"""

from __future__ import annotations

import math
import numbers
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sim_jax import optim, recipe, rollout
from sim_jax.diffusion import samplers
from sim_jax.evals import features, figures

_CHOICES = {
    "precision": ("highest", "high", "default"), "teacher.sampler": samplers.SAMPLERS,
    "generator.inputs": rollout.INPUTS, "fake_score.turns": ("every", "other"), "fake_score.images": recipe.IMAGES,
    "gan.features": recipe.FEATURES, "gan.pairing": recipe.PAIRINGS, "run.on_divergence": ("stop", "rollback"),
}
# (keys, in words, what must hold); "*." stands for both trained networks. A key that a config lacks, or None, is not checked.
_RANGES: tuple[tuple[tuple[str, ...], str, Callable[[float], bool]], ...] = (
    (("total_kimg", "batch_size", "generator.sigma_init", "fake_score.updates", "teacher.num_steps", "gan.clamp", "regression.num_pairs",
      "run.log_every", "run.probe_every", "run.sample_every", "run.save_every", "run.keep", "run.steps_per_call",
      "run.grid", "run.probe_images", "run.batch_per_device", "network.sigma_data",
      "network.img_resolution", "network.img_channels", "network.model_channels", "network.num_blocks", "network.channel_mult_emb",
      "data.max_size", "data.pad_to"),
     "above 0", lambda value: value > 0),
    (("max_batch_per_device", "ema.rampup", "generator.start_kimg", "gan.weight", "gan.critic_weight", "gan.start_kimg",
      "regression.weight", "run.panel_images", "run.keep_every", "run.max_rollbacks", "run.eval_every", "run.eval_images", "run.data_threads",
      "network.label_dim", "network.augment_dim", "*.optimizer.final_fraction"), "0 or above", lambda value: value >= 0),
    (("seed",), f"0 to {2**32 - 1}", lambda value: 0 <= value < 2**32),
    (("fake_score.augment_p",), "0 to 1", lambda value: 0 <= value <= 1),
    (("run.rollback_lr",), "above 0, at most 1", lambda value: 0 < value <= 1),
    (("network.dropout", "network.label_dropout", "*.dropout"), "0 or above, below 1", lambda value: 0 <= value < 1),
)


def check(config: Mapping[str, Any]) -> None:
    """Checks the values of a config, given as nested dicts.

    Raises: ValueError naming the first key that is wrong, what came and what is allowed.
    """
    values = dict(_leaves(config))
    for key, value in values.items():
        if isinstance(value, numbers.Real) and not math.isfinite(value):
            raise ValueError(f"{key}: got {value}, allowed: finite numbers")
    for key, allowed in _CHOICES.items():
        if values[key] not in allowed:
            raise ValueError(f"{key}: got {values[key]!r}, allowed: {', '.join(allowed)}")
    for patterns, words, holds in _RANGES:
        for pattern in patterns:
            for key in (pattern.replace("*", role) for role in (("generator", "fake_score") if "*" in pattern else ("",))):
                if values.get(key) is not None and not holds(values[key]):
                    raise ValueError(f"{key}: got {values[key]}, allowed: {words}")
    _check_lists(values)
    if values["fake_score.turns"] == "other" and values["fake_score.updates"] == 1:
        raise ValueError("fake_score.turns: got 'other' with fake_score.updates 1, allowed: 'every', or updates of 2 or more")
    _check_calls(values)
    if 0 < values["run.eval_images"] < 100:
        raise ValueError(f"run.eval_images: got {values['run.eval_images']}, allowed: 0 (no evaluation) or at least 100")


def check_measure(run: Mapping[str, Any], *, resolution: int, channels: int) -> None:
    """Whether what the figures are measured in is there, and can see images of this size."""
    if run["features"] == "none" or not run["eval_images"]:
        return
    try:
        extractor = features.open_features(run["features"])
    except ValueError as error:
        raise ValueError(f"run.{error}") from None
    try:
        extractor.check((1, resolution, resolution, channels))
    except ValueError as error:
        allowed = str(error).partition("allowed: ")[2]
        raise ValueError(f"run.features: got {run['features']!r} for images of {resolution}x{resolution}x{channels}, allowed: {allowed}") from None
    try:
        figures.parse(run["metrics"])
    except ValueError as error:
        raise ValueError(f"run.{error}") from None
    if run["best"] and run["best"] not in ("fd", "kd"):
        raise ValueError(f"run.best: got {run['best']!r}, allowed: fd, kd, or an empty string")
    if run["best"] and run["best"] not in figures.parse(run["metrics"]):
        raise ValueError(f"run.best: got {run['best']!r}, which is not among run.metrics {tuple(run['metrics'])}")
    path = run["reference"]
    if path and path != "digits" and not pathlib.Path(path).exists():
        raise ValueError(f"run.reference: got {path!r}, allowed: digits, or a zip, folder or .npz that exists")


def _leaves(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _check_lists(values: Mapping[str, Any]) -> None:
    halflives = values["ema.halflife_kimg"]
    if not all(_real(h) and 0 < h < math.inf for h in halflives) or len(set(optim.ema_names(halflives))) < len(halflives):
        raise ValueError(f"ema.halflife_kimg: got {halflives}, allowed: different numbers above 0, or ()")
    for key, least, empty in (("network.channel_mult", 1, False), ("network.attn_resolutions", 1, True)):
        got = values.get(key) or ()
        if key in values and not (all(isinstance(n, int) and n >= least for n in got) and (got or empty)):
            raise ValueError(f"{key}: got {got}, allowed: whole numbers from {least}")


def _check_calls(values: Mapping[str, Any]) -> None:
    """Whatever happens every so many iterations happens between calls."""
    size = values["run.steps_per_call"]
    if size % values["fake_score.updates"] and size > 1:
        raise ValueError(f"run.steps_per_call: got {size}, allowed: 1, or multiples of the {values['fake_score.updates']} of fake_score.updates")
    for key in (f"run.{what}_every" for what in ("log", "probe", "sample", "eval", "save", "keep")):
        if values[key] % size:
            raise ValueError(f"{key}: got {values[key]}, allowed with run.steps_per_call {size}: multiples of it")


def _real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
