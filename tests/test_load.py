"""Networks from files, and the generator object that users hold."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import runs
import sim_jax
from sim_jax import load, weights


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, patch):
    """A directory of weights of a network that is traced in a moment."""
    runs.use_pixel_networks(patch)
    return runs.untrained_teacher(tmp_path_factory.mktemp("teacher") / "weights")


@pytest.fixture(scope="module")
def generator(tmp_path_factory, teacher):
    """The same weights as a one-step generator that was trained on two classes only."""
    file = tmp_path_factory.mktemp("generator") / "generator.safetensors"
    loaded = load.load(teacher)
    histogram = [0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    weights.save_file(file, loaded.params, loaded.network.spec, {"sigma_init": 2.5, "step": 8, "ema": "ema_2k",
                                                                 "labels": {"scheme": "histogram", "histogram": histogram}})
    return sim_jax.load_generator(file)


def test_a_file_with_sigma_init_is_a_one_step_generator(generator, teacher):
    assert generator.sampler.spec.calls == 1 and generator.loaded.sigma_init == 2.5
    assert {key: generator.loaded.origin[key] for key in ("step", "ema")} == {"step": 8, "ema": "ema_2k"}
    denoiser = sim_jax.load_generator(teacher)
    assert denoiser.sampler.spec.calls == 35 and sim_jax.load_generator(teacher, num_steps=4).sampler.spec.calls == 7
    np.testing.assert_array_equal(denoiser.loaded.params["enc"]["weight"], generator.loaded.params["enc"]["weight"])


def test_an_image_depends_on_seed_index_and_class_only(generator):
    whole = generator.sample(10, seed=3, class_labels=np.arange(10))
    assert whole.dtype == np.uint8 and whole.shape == (10, 8, 8, 1)
    np.testing.assert_array_equal(generator.sample(4, seed=3, class_labels=[0, 1, 2, 3]), whole[:4])
    small = dataclasses.replace(generator, sampler=load.ImageSampler(
        generator.loaded.network, generator.sampler.spec, generator.sampler.latents, batch_per_device=3))
    np.testing.assert_array_equal(small.sample(10, seed=3, class_labels=np.arange(10)), whole)
    changed = generator.sample(10, seed=3, class_labels=[0, 1, 2, 3, 4, 5, 6, 7, 8, 8])
    assert (changed != whole).any(axis=(1, 2, 3)).tolist() == [False] * 9 + [True]
    assert (generator.sample(10, seed=4, class_labels=np.arange(10)) != whole).any(axis=(1, 2, 3)).all()


def test_classes_are_drawn_as_in_training(generator):
    drawn = generator.sampler.latents.classes_of(0, np.arange(200))
    assert set(drawn.tolist()) == {3, 8} and 60 < (drawn == 3).sum() < 140
    np.testing.assert_array_equal(generator.sample(5, seed=0), generator.sample(5, seed=0, class_labels=drawn[:5]))
    np.testing.assert_array_equal(generator.sample(3, class_labels=7), generator.sample(3, class_labels=[7, 7, 7]))


@pytest.mark.parametrize("arguments, message", [
    (dict(num=0), "num: got 0, allowed: 1 or more"),
    (dict(num=2, class_labels=10), "classes: got 10, allowed: 0 to 9"),
    (dict(num=2, class_labels=[0, -1]), "classes: got -1, allowed: 0 to 9"),
    (dict(num=2, class_labels=[0.5, 1.5]), "allowed: a list of whole numbers"),
    (dict(num=3, class_labels=[0, 1]), "class_labels: got 2 for 3 images"),
])
def test_what_sample_refuses(generator, arguments, message):
    with pytest.raises(ValueError, match=message):
        generator.sample(**arguments)


def test_random_teachers_are_a_function_of_their_seed(teacher):
    spec = load.load(teacher).network.spec
    first, again, other = (load.load_teacher(f"random:{seed}", ema=None, spec=spec) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.params["enc"]["weight"], again.params["enc"]["weight"])
    assert (first.params["enc"]["weight"] != other.params["enc"]["weight"]).any()
    assert first.sigma_init is None and first.origin == {"path": "random:3"}


def test_a_config_json_of_something_else_is_no_workdir(tmp_path):
    (tmp_path / "config.json").write_text('{"model": "bert"}')
    with pytest.raises(ValueError, match="not written by sim_jax.main"):
        load.load(tmp_path)


def test_a_workdir_without_a_checkpoint_yet(tmp_path, teacher):
    import json

    spec = dict(load.load(teacher).network.spec)
    config = {"ema": {"halflife_kimg": [2.0]}, "method": "sim", "generator": {"sigma_init": 2.5}, "labels": {}}
    (tmp_path / "config.json").write_text(json.dumps({"config": config, "network": spec}))
    with pytest.raises(ValueError, match="no checkpoint there"):
        load.load(tmp_path)
