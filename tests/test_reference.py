"""References: files of statistics from EDM, ADM and ourselves, and data sets; foreign and broken ones in one line."""

import dataclasses
import json
import zipfile

import numpy as np
import pytest

import measuring
from sim_jax import images
from sim_jax.evals import figures, frechet, reference, runner, statistics, streams

ALL = tuple(figures.METRICS)


@pytest.fixture
def real():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (300, 4, 4, 1), np.uint8), rng.integers(0, 4, 300).astype(np.int32)


@pytest.fixture
def data(tmp_path, real):
    path = tmp_path / "real.npz"
    images.save_samples(path, *real)
    return str(path)


@pytest.fixture
def extractor():
    return measuring.pixel_features()


def _statistics(extractor, pixels):
    features, _, spatial = (x.astype(np.float64) for x in extractor.extract(pixels))
    return {"mu": features.mean(0), "sigma": np.cov(features.T), "mu_s": spatial.mean(0), "sigma_s": np.cov(spatial.T)}


def test_edms_file(tmp_path, real, extractor):
    pixels, _ = real
    known = _statistics(extractor, pixels)
    path = tmp_path / "edm.npz"
    np.savez(path, mu=known["mu"], sigma=known["sigma"])
    got = reference.open_reference(str(path), extractor, ("features",))
    np.testing.assert_array_equal(got.features.mean, known["mu"])
    assert got.count is None and got.extractor == "" and got.origin == "edm.npz" and len(got.hash) == 12
    np.savez(path, mu=known["mu"] + 1e-9, sigma=known["sigma"])
    assert reference.open_reference(str(path), extractor, ("features",)).hash != got.hash
    # The distance is the one that EDM's own formula gives.
    measure = runner.open_measure(features=extractor, metrics="fid", reference=str(path))
    result = measure.stream(streams.open_stream(_save(tmp_path, pixels[:200])))
    other = _statistics(extractor, pixels[:200])
    expected = frechet.frechet_distance(other["mu"], other["sigma"], known["mu"] + 1e-9, known["sigma"])
    assert result.numbers["fd"] == pytest.approx(expected, rel=1e-9)
    assert result.protocol["reference_features"] == "not recorded in the file" and "does not say" in result.protocol["notes"][-1]


def _save(tmp_path, pixels):
    np.savez(tmp_path / "samples.npz", images=pixels)
    return str(tmp_path / "samples.npz")


def test_adms_file_has_statistics_of_all_and_images_of_some(tmp_path, real, extractor):
    pixels, _ = real
    known = _statistics(extractor, pixels)
    path = tmp_path / "adm.npz"
    np.savez(path, arr_0=pixels[:90], **known)
    got = reference.open_reference(str(path), extractor, ("features", "spatial", "rows"))
    np.testing.assert_array_equal(got.features.covariance, known["sigma"])
    np.testing.assert_array_equal(got.spatial.covariance, known["sigma_s"])
    np.testing.assert_array_equal(got.rows.features, extractor.extract(pixels[:90])[0])
    assert got.count is None


def test_what_we_write_says_where_it_came_from_and_measures_the_same(tmp_path, data, extractor):
    from_data = runner.open_measure(features=extractor, metrics=ALL, reference=data)
    path = reference.write_reference(tmp_path / "r.npz", from_data.reference)
    from_file = runner.open_measure(features=extractor, metrics=ALL, reference=str(path))
    assert from_file.reference.hash == from_data.reference.hash and from_file.reference.origin == "real.npz"
    assert from_file.reference.count == 300 and from_file.reference.extractor == "pixels:0"
    rng = np.random.default_rng(1)
    samples = tmp_path / "s.npz"
    images.save_samples(samples, rng.integers(0, 200, (150, 4, 4, 1), np.uint8), rng.integers(0, 4, 150))
    results = [measure.stream(streams.open_stream(str(samples))) for measure in (from_data, from_file)]
    assert results[0].numbers == results[1].numbers and results[0].protocol == results[1].protocol
    assert {"fd", "sfd", "kd", "is", "precision", "class_agreement", "class_tv", "class_fd", "noise_floor", "fd_inf",
            "nearest_pixel_share"} <= results[0].numbers.keys()
    with np.load(path) as file:                      # EDM's names, so that EDM's tools read it
        np.testing.assert_array_equal(file["mu"], from_data.reference.features.mean)


def test_the_reference_does_not_depend_on_the_kind_of_file(tmp_path, real, data, extractor):
    images.save_samples(tmp_path / "real.zip", *real)
    one, two = (reference.open_reference(str(path), extractor, ("features", "predicted")) for path in (data, tmp_path / "real.zip"))
    assert one.hash == two.hash
    np.testing.assert_array_equal(one.features.covariance, two.features.covariance)


def _foreign(tmp_path, known, kind):
    path = tmp_path / "x.npz"
    known = {key: known[key] for key in ("mu", "sigma")}
    if kind == "other network":
        known = {"mu": np.zeros(2048), "sigma": np.eye(2048)}
    elif kind == "no sigma":
        del known["sigma"]
    elif kind == "nan":
        known["mu"] = np.full(16, np.nan)
    elif kind == "shape":
        known["sigma"] = np.eye(15)
    elif kind == "not symmetric":
        known["sigma"] = np.triu(np.ones((16, 16)))
    elif kind == "integers":
        known["mu"] = np.zeros(16, int)
    elif kind == "something else":
        known = {"weights": np.zeros(3)}
    elif kind == "pickled":
        known["mu"] = np.array([{}], object)
    np.savez(path, **known)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:700])
    return str(path)


@pytest.mark.parametrize("kind, message", [
    ("other network", r"got statistics of 2048 features in .*, allowed: 16, as pixels:0 has"), ("no sigma", "allowed: both mu and sigma"),
    ("nan", "NaN or infinity in mu or sigma"), ("shape", r"mu float64 \[16\] and sigma \[15, 15\]"), ("not symmetric", "no covariance"),
    ("integers", r"mu int64 \[16\]"), ("something else", "with weights, allowed: an .npz with images"), ("pickled", "not a readable .npz"),
    ("cut", "truncated or corrupt"),
])
def test_foreign_and_broken_files_are_refused_in_one_line(tmp_path, real, extractor, kind, message):
    with pytest.raises(ValueError, match=message) as error:
        reference.open_reference(_foreign(tmp_path, _statistics(extractor, real[0]), kind), extractor, ("features",))
    assert "\n" not in str(error.value) and "reference" in str(error.value)


def test_statistics_are_not_enough_for_every_metric(tmp_path, real, extractor):
    np.savez(tmp_path / "edm.npz", **_statistics(extractor, real[0]))
    with pytest.raises(ValueError, match="edm.npz has no rows, which these metrics need"):
        runner.open_measure(features=extractor, metrics="fd,kd", reference=str(tmp_path / "edm.npz"))


def test_our_file_for_other_metrics_or_other_features(tmp_path, data, extractor):
    summary = reference.open_reference(data, extractor, ("features", "rows"))
    path = str(reference.write_reference(tmp_path / "r.npz", summary))
    with pytest.raises(ValueError, match="has no pixels, predicted"):
        reference.open_reference(path, extractor, ("features", "predicted", "rows", "pixels"))
    with pytest.raises(ValueError, match="statistics of pixels:0 in .*, allowed: of other:1"):
        reference.open_reference(path, dataclasses.replace(extractor, identifier="other:1"), ("features",))


@pytest.mark.parametrize("about", ["{}", "[]", "not json", '{"version": 2}', "null"])
def test_our_file_damaged(tmp_path, data, extractor, about):
    np.savez(tmp_path / "r.npz", about=np.array(about), mu=np.zeros(16), sigma=np.eye(16))
    with pytest.raises(ValueError, match="was not written by --write-reference|version 2"):
        reference.open_reference(str(tmp_path / "r.npz"), extractor, ("features",))


def test_writing_is_atomic_and_wants_npz(tmp_path, data, extractor, monkeypatch):
    summary = statistics.collect(streams.open_stream(data), extractor, ("features",))
    with pytest.raises(ValueError, match="write-reference: got .*r.zip"):
        reference.write_reference(tmp_path / "r.zip", summary)
    path = reference.write_reference(tmp_path / "r.npz", summary)
    before = path.read_bytes()

    def fail(file, **arrays):
        file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(KeyboardInterrupt):
        reference.write_reference(path, summary)
    assert path.read_bytes() == before and [p.name for p in tmp_path.glob("*r.npz*")] == ["r.npz"]
    with zipfile.ZipFile(path) as archive:
        assert json.loads(str(np.load(path)["about"]))["count"] == 300 and "mu.npy" in archive.namelist()
