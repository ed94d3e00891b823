"""Every shipped config, by itself and with each of its words, builds at full size and has a training step, by shapes alone."""

from __future__ import annotations

import dataclasses
import importlib
import pathlib
import sys

import jax
import pytest

from sim_jax import cost, experiment, networks, steps

ROOT = pathlib.Path(__file__).resolve().parents[1]
NAMES = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem not in ("common", "__init__"))
sys.path.insert(0, str(ROOT))
_TRACED: set[str] = set()


def _config(name: str):
    return importlib.import_module(f"configs.{name}")


def _variants() -> list[tuple[str, str | None]]:
    """(config, word): each config without words, and with every word that is not a default, one at a time."""
    return [(name, word) for name in NAMES for word in (None, *(w for group in _config(name).WORDS.values() for w in group[1:]))]


def _trace(config, built: experiment.Experiment) -> None:
    """Traces every kind of training step that the run will take."""
    recipe = dataclasses.replace(built.recipe, loop="scan")  # one micro-batch is traced instead of all of them
    teacher = None if built.teacher is None else built.teacher.params
    batch = None
    if not built.distils or recipe.adversary:
        shape = (config.batch_size, *built.trained.network.image_shape)
        batch = {"image": jax.ShapeDtypeStruct(shape, "float32"), "label": jax.ShapeDtypeStruct(shape[:1], "int32")}
    if recipe.regression is not None:
        shape = (config.batch_size, *built.trained.network.image_shape)
        pair = {"index": jax.ShapeDtypeStruct(shape[:1], "uint32"), "image": jax.ShapeDtypeStruct(shape, "float32"),
                "label": jax.ShapeDtypeStruct(shape[:1], "int32")}
        batch = {**(batch or {}), "pair": pair}
    if (text := cost.text_shape(built.trained.network)) is not None:
        rows = {"text": jax.ShapeDtypeStruct((config.batch_size, *text), "bfloat16"),
                "text_mask": jax.ShapeDtypeStruct((config.batch_size, text[0]), "bool")}
        batch = {**(batch or {}), **rows}
    for turns in {tuple(built.turns(built.start_steps + step).items()) for step in range(config.fake_score.updates)}:
        new, metrics = jax.eval_shape(
            lambda *args: steps.train_step(recipe, *args, **dict(turns)), built.shapes, teacher, jax.random.key(0), batch)
        assert jax.tree.map(lambda a: (a.shape, a.dtype), new) == jax.tree.map(lambda a: (a.shape, a.dtype), built.shapes)
        assert all(value.shape == () for value in metrics.values())
        assert any(name.endswith("/loss") for name in metrics)


@pytest.mark.parametrize("name, word", _variants())
def test_config_builds_and_steps_at_full_size(name, word):
    config = _config(name).get_config(word)
    built = experiment.build(config, with_data=False, with_weights=False)
    assert built.distils == (config.method != "dsm")
    assert built.total_steps >= 1
    # Tracing a large network takes many seconds, so variants that differ in numbers alone share it.
    kind = repr((config.network.to_dict(), config.method, config.objective.to_dict(), built.recipe.micro_batches > 1))
    if kind not in _TRACED:
        if "depth" in config.network:  # blocks are alike, and tracing all of them takes half a minute
            config.network.depth = 2
            built = experiment.build(config, with_data=False, with_weights=False)
        _trace(config, built)
        _TRACED.add(kind)


@pytest.mark.parametrize("name", NAMES)
def test_docstring_tells_what_the_house_asks(name):
    doc = _config(name).__doc__
    for heading in ("Paper:", "Command:", "Hardware:"):
        assert heading in doc
    assert f"configs/{name}.py" in doc
    for group in _config(name).WORDS.values():
        assert all(word in doc for word in group[1:]), f"{name}: a word that the docstring does not explain"


@pytest.mark.parametrize("name", NAMES)
def test_unknown_words_and_keys_are_refused(name):
    with pytest.raises(ValueError, match="config argument: got 'bogus', allowed"):
        _config(name).get_config("bogus")
    config = _config(name).get_config()
    with pytest.raises(AttributeError):
        config.lock().no_such_key = 1


@pytest.mark.parametrize("name, word, count", [
    ("cifar10", "uncond", 55_733_891), ("cifar10", "cond", 55_735_299), ("cifar10", "ve", 56_397_827), ("imagenet64", None, 295_899_267),
    ("pixart512", None, 610_856_096 + 491_520)])
def test_networks_have_the_size_of_the_published_checkpoints(name, word, count):
    """Counted in EDM's own code, with its augmentation labels."""
    network = networks.build(_config(name).get_config(word).network.to_dict())
    assert network.num_params() == count


def test_without_weights_the_teacher_is_shapes():
    built = experiment.build(_config("digits").get_config(), with_weights=False)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(built.teacher.params))
