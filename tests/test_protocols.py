"""The published protocols, literally; rounding and label schemes against numbers written down here."""

import numpy as np
import pytest

from sim_jax.diffusion.samplers import FewStep
from sim_jax.evals import protocols
from sim_jax.evals.generate import Latents, SamplerSpec


def test_the_table_is_what_the_papers_did():
    about = {name: protocol.about() for name, protocol in protocols.PROTOCOLS.items()}
    assert about["edm"]["samples"] == ["0-49999", "50000-99999", "100000-149999"]
    assert about["edm"]["label_scheme"] == "uniform" and about["edm"]["summary"] == "min"
    assert len(about["sid"]["samples"]) == 10 and about["sid"]["summary"] == "mean" and about["sid"]["label_scheme"] == "data"
    assert about["dmd2"] == {"protocol": "dmd2", "count": 50000, "seed": 10, "samples": ["0-49999"], "label_scheme": "balanced",
                             "rounding": "clip((x + 1) * 127.5)", "summary": "mean"}
    assert about["edm"]["rounding"] == about["sid"]["rounding"] == "clip(x * 127.5 + 128)"
    assert list(about) == ["edm", "sid", "dmd2", "coco", "quick"]


def test_a_changed_protocol_says_so():
    assert protocols.get("edm").about()["protocol"] == "edm"
    assert protocols.get("edm", count=50_000, seed=0).about()["protocol"] == "edm"
    assert protocols.get("edm", count=100, seed=7).about()["protocol"] == "edm, but with count 100, seed 7"


@pytest.mark.parametrize("rounding, expected", [("edm", [0, 0, 0, 128, 255, 255, 191]), ("dmd2", [0, 0, 0, 127, 255, 254, 191])])
def test_roundings(rounding, expected):
    # EDM: 127.5 x + 128 is 0.5, 128, 255.5 at -1, 0, 1; DMD2's is 0, 127.5, 255, half a level darker.
    x = np.array([-1.5, -1.0, -0.999, 0.0, 1.0, 0.9999, 0.5], np.float32)
    got = protocols.ROUNDINGS[rounding][1](x)
    assert got.dtype == np.uint8 and got.tolist() == expected


def test_the_two_roundings_differ_by_half_a_level():
    x = np.linspace(-1, 1, 10001, dtype=np.float32)
    edm, dmd2 = (protocols.ROUNDINGS[name][1](x).astype(int) for name in ("edm", "dmd2"))
    assert np.unique(edm - dmd2).tolist() == [0, 1] and 0.4 < np.mean(edm - dmd2) < 0.6


def test_label_schemes():
    trained = Latents((4, 4, 1), 4, "histogram", (1, 0, 0, 1))
    draw = lambda name, counts=None: protocols.latents(protocols.get(name), trained, counts).classes_of(10, np.arange(4000))
    assert np.bincount(draw("quick"), minlength=4)[[1, 2]].sum() == 0                     # as trained
    assert (np.bincount(draw("edm"), minlength=4) > 800).all()                            # at random
    np.testing.assert_array_equal(draw("dmd2"), np.arange(4000) % 4)                      # in turn
    assert np.bincount(draw("sid", np.array([3, 1])), minlength=4) / 4000 == pytest.approx([0.75, 0.25, 0, 0], abs=0.03)
    assert (np.bincount(draw("sid"), minlength=4) > 800).all()                            # unknown: uniform
    with pytest.raises(ValueError, match="reference: got 5 classes, allowed: at most 4"):
        draw("sid", np.ones(5, int))
    plain = Latents((4, 4, 1))
    assert protocols.latents(protocols.get("dmd2"), plain) is plain


def test_samplers_in_words():
    assert protocols.describe(SamplerSpec(num_steps=18)) == "heun, 18 steps, 35 network calls"
    assert protocols.describe(SamplerSpec(few_step=FewStep((2.5,)))) == "1 network call at sigma 2.5"
    assert "S_churn 40" in protocols.describe(SamplerSpec(num_steps=2, S_churn=40.0))


@pytest.mark.parametrize("knobs, message", [
    (dict(name="fid"), "protocol: got 'fid', allowed: edm, sid, dmd2, coco, quick"), (dict(name="edm", count=1), "num: got 1"),
    (dict(name="edm", seed=-1), "seed: got -1"),
])
def test_bad_words(knobs, message):
    with pytest.raises(ValueError, match=message):
        protocols.get(**knobs)
