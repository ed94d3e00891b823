"""Measuring a generator: the same figures as by hand, whatever the batch and the devices; protocols summed up as they say."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import measuring
import tiny
from sim_jax import sharding
from sim_jax.data import digits
from sim_jax.diffusion.samplers import FewStep
from sim_jax.evals import figures, frechet, protocols, runner, streams
from sim_jax.evals.features import digits_features
from sim_jax.evals.generate import ImageSampler, Latents, SamplerSpec
from sim_jax.evals.quality import quality

NET = tiny.PixelNet(size=4)
PARAMS = tiny.random_params(NET.shapes(), 4)


def _sampler(devices=1, batch=16, params=PARAMS):
    layout = sharding.Layout(sharding.make_mesh(devices=jax.devices()[:devices]))
    made = ImageSampler(NET, SamplerSpec(few_step=FewStep((2.5,))), Latents(NET.image_shape, 3), layout=layout, batch_per_device=batch)
    return made, sharding.place(params, jax.tree.map(lambda _: layout.replicated, params)), batch * devices


@pytest.fixture(scope="module")
def measure():
    rng = np.random.default_rng(0)
    real = rng.integers(0, 256, (400, 4, 4, 1), np.uint8)
    labels = (np.arange(400) % 4 > 2).astype(np.int32)
    stream = streams.ImageStream(count=400, image_shape=(4, 4, 1), read=lambda size: iter([real]), labels=labels, origin="real")
    needs = figures.needs(figures.METRICS, of_reference=True)
    summary = runner.statistics.collect(stream, measuring.pixel_features(), needs)
    return runner.open_measure(features=measuring.pixel_features(), metrics=tuple(figures.METRICS), reference=summary)


@pytest.fixture(scope="module")
def result(measure):
    sampler, params, batch = _sampler()
    return measure.samples(sampler, params, seed=3, count=100, batch=batch)


def test_the_figures_are_those_of_the_sampled_images(measure, result):
    sampler, params, _ = _sampler()
    pixels, classes = sampler(params, seed=3, count=100)
    assert result.protocol["images"] == runner.streams.end_hash(_digest(pixels), classes)
    x = measuring.pixel_features().extract(pixels)[0].astype(np.float64)
    expected = frechet.distance(frechet.Gaussian(x.mean(0), np.cov(x.T)), measure.reference.features)
    assert result.numbers["fd"] == pytest.approx(expected, rel=1e-9)
    assert result.numbers["class_agreement"] == np.mean(pixels[:, 0, 0, 0] // 64 == classes)
    assert all(np.isfinite(value) for value in result.numbers.values())
    assert set(result.pictures) == {"nearest"} and set(result.details) == {"predicted", "real_predicted", "class_fd"}


def _digest(pixels):
    digest = streams.begin_hash(pixels.shape)
    digest.update(pixels.tobytes())
    return digest


@pytest.mark.parametrize("devices, batch", [(1, 16), (4, 16), (1, 100), (4, 7)])
def test_batch_and_devices_change_nothing(measure, result, devices, batch):
    sampler, params, whole = _sampler(devices, batch)
    got = measure.samples(sampler, params, seed=3, count=100, batch=whole)
    same = got.protocol["images"] == result.protocol["images"]
    assert same or batch != 16                   # another batch shape may move a pixel by one level
    for name, value in result.numbers.items():
        assert got.numbers[name] == pytest.approx(value, rel=1e-9 if same else 2e-2, abs=1e-9 if same else 1e-2), name


def test_the_protocol_is_complete_and_json(result):
    protocol = json.loads(json.dumps(result.protocol))
    expected = {"count": 100, "seed": 3, "samples": "0-99", "label_scheme": "uniform", "rounding": "clip(x * 127.5 + 128)", "calls": 1,
                "sampler": "1 network call at sigma 2.5", "features": "pixels:0", "reference_origin": "real", "reference_count": 400,
                "reference_features": "pixels:0"}
    assert protocol == protocol | expected
    assert len(protocol["reference"]) == 12


def test_other_samples_other_figures(measure, result):
    sampler, params, batch = _sampler()
    for change in (dict(seed=4), dict(start=100), dict(classes=np.zeros(100, np.int32)), dict(rounding="dmd2")):
        assert measure.samples(sampler, params, **{**dict(seed=3, count=100, batch=batch), **change}).numbers["fd"] != result.numbers["fd"]


def test_runs_are_consecutive_and_summed_up(measure):
    sampler, params, batch = _sampler()
    measure = dataclasses.replace(measure, metrics=("fd", "class"))
    protocol = protocols.get("edm", count=50)
    done = []
    got = measure.runs(sampler, params, protocol, batch=batch, progress=done.append)
    alone = [measure.samples(sampler, params, seed=0, start=start, count=50, batch=batch).numbers for start in (0, 50, 100)]
    fd = [numbers["fd"] for numbers in alone]
    best = alone[int(np.argmin(fd))]
    assert got.numbers["fd"] == min(fd) and got.numbers["class_tv"] == best["class_tv"]     # all figures are of the quoted run
    assert got.numbers["fd_mean"] == pytest.approx(np.mean(fd)) and got.numbers["fd_spread"] == pytest.approx(np.std(fd, ddof=1))
    assert [run["fd"] for run in got.details["runs"]] == fd
    assert got.protocol["protocol"] == "edm, but with count 50" and got.protocol["samples"] == ["0-49", "50-99", "100-149"]
    assert done[-1] == 150 and done == sorted(done)
    mean = measure.runs(sampler, params, dataclasses.replace(protocol, summary="mean"), batch=batch)
    assert mean.numbers["fd"] == pytest.approx(np.mean(fd)) and mean.numbers["fd_spread"] == got.numbers["fd_spread"]
    json.dumps([got.protocol, got.details])


def test_sid_draws_classes_as_the_reference_has_them(measure):
    sampler, params, batch = _sampler()
    measure = dataclasses.replace(measure, metrics=("fd",), reference=dataclasses.replace(measure.reference, label_counts=np.array([0, 7])))
    got = measure.runs(sampler, params, protocols.get("sid", count=10), batch=batch)
    classes = np.ones(10, np.int32)
    same = measure.samples(sampler, params, seed=0, start=90, count=10, classes=classes, batch=batch)
    assert got.details["runs"][-1]["images"] == same.protocol["images"] and got.protocol["label_scheme"] == "histogram"


def test_it_agrees_with_the_quality_table():
    real = digits.load()
    table = quality(real.images[:300], real.labels[:300], real_images=real.images, real_labels=real.labels, features=digits_features())
    measure = runner.open_measure(features="digits", reference="digits", metrics=("fd", "pr", "class", "floor"))
    stream = streams.ImageStream(count=300, image_shape=(8, 8, 1), read=lambda size: iter([real.images[:300]]), labels=real.labels[:300])
    got = measure.stream(stream)
    for name in ("fd", "class_agreement", "real_class_agreement", "precision", "recall", "density", "coverage", "noise_floor"):
        assert got.numbers[name] == pytest.approx(table[name], rel=1e-9), name
    assert got.protocol["reference"] == table["reference"] and got.protocol["features"] == table["features"]


def test_notes_for_few_images(measure):
    sampler, params, batch = _sampler()
    few = dataclasses.replace(measure, metrics=("fd",)).samples(sampler, params, seed=0, count=12, batch=batch)
    assert few.protocol["notes"][0].startswith("12 images for 16 features: the covariance is singular")
    capped = dataclasses.replace(measure, metrics=("pr",), max_rows=20).samples(sampler, params, seed=0, count=40, batch=batch)
    assert capped.protocol["notes"] == ["metrics of single images use 20 of 40 samples"]
    real = runner.open_measure(features="digits", reference="digits", metrics="fd")
    assert any("perfect samples would show" in note for note in real.stream(streams.open_stream("digits", num=200)).protocol["notes"])


def test_a_network_that_gives_nan_is_refused(measure):
    sampler, params, batch = _sampler(params=jax.tree.map(lambda p: np.full_like(p, np.nan), PARAMS))
    with pytest.raises(ValueError, match="samples: got 16 of 16 images with NaN or infinity, from sample 0 on"):
        measure.samples(sampler, params, seed=0, count=100, batch=batch)


@pytest.mark.parametrize("knobs, message", [
    (dict(metrics="fd,fidd", reference="digits"), "metrics: got 'fidd', allowed: fd, fd_inf"), (dict(metrics=""), "metrics: got ''"),
    (dict(metrics="is,kid"), "reference: got nothing, allowed: .*, as kd needs one"), (dict(metrics="sfd"), "which has no spatial"),
    (dict(metrics="is", features="vgg"), "features: got 'vgg', allowed: digits, mnist"),
    (dict(metrics="is", convention="adm"), "convention: got 'adm', allowed for Inception"),
    (dict(metrics="is", image_shape=(32, 32, 3)), "images: got uint8 32x32x3, allowed"),
])
def test_bad_words(knobs, message):
    with pytest.raises(ValueError, match=message):
        runner.open_measure(**{"features": "digits", **knobs})


def test_a_metric_of_the_samples_alone_needs_no_reference():
    result = runner.open_measure(features="digits", metrics="is").stream(streams.open_stream("digits"))
    assert 9 < result.numbers["is"] <= 10 and result.protocol["reference"] is None


def own_features(*, layout):
    return measuring.pixel_features((8, 8, 1))


def test_features_of_somebody_s_own_module():
    assert runner.open_measure(features="test_runner:own_features", metrics="is").extractor.identifier == "pixels:0"
    for name, message in (("test_runner:nothing", "no attribute 'nothing'"), ("no_such_module:x", "No module named"),
                          ("builtins:dict", "got dict from builtins:dict")):
        with pytest.raises(ValueError, match=f"features: .*{message}"):
            runner.open_measure(features=name, metrics="is")
