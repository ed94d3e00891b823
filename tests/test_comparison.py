"""Tables and pictures of several sets of images; the flags that say how to sample."""

import argparse
import types

import numpy as np
import pytest

from sim_jax import comparison, sampler_flags
from sim_jax.comparison import Entry
from sim_jax.diffusion.samplers import FewStep


def _entry(name, preview=None, **figures):
    return Entry(name, {"protocol": {"count": 10, "features": "a:0", "reference": "b"}, **figures}, preview)


def test_numbers_as_people_read_them():
    shown = [comparison.number(value) for value in (None, 3, 3.0, 0.123456, 12345.678, 1e-7, float("nan"), True)]
    assert shown == ["-", "3", "3", "0.1235", "1.235e+04", "1e-07", "nan", "1"]


def test_the_table_has_the_figures_that_exist_and_warns_where_rows_differ():
    text = comparison.markdown([_entry("one", fd=1.5, precision=0.25), _entry("two", fd=2.0)])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert rows[0] == ["", "images", "FD ↓", "precision ↑"] and rows[2:] == [["one", "10", "1.5", "0.25"], ["two", "10", "2", "-"]]
    other = Entry("three", {"fd": 1.0, "protocol": {"count": 20, "features": "c:0", "reference": "b"}})
    assert comparison.markdown([_entry("one", fd=1.5), other]).endswith("Not the same in all rows: the features, the number of images.")


def test_the_picture_takes_sets_of_different_sizes_and_colours():
    grey, colour = np.zeros((3, 4, 4, 1), np.uint8), np.full((12, 8, 6, 3), 100, np.uint8)
    picture = comparison.picture([_entry("grey", grey), _entry("none"), _entry("colour", colour)], count=5)
    scale = 6                                        # 8 pixels are shown as 48
    inside = picture[:, -(5 * (6 * scale + 1) + 1):]
    assert picture.shape[0] == 2 * (8 * scale + 1) + 1 and picture.shape[2] == 3
    assert (inside[1:4 * scale + 1, 1:4 * scale + 1] == 0).all() and (inside[4 * scale + 1:8 * scale, 1:] == 255).all()
    assert (inside[8 * scale + 2:-1, 1:6 * scale + 1] == 100).all()
    assert comparison.picture([_entry("none")]) is None


def test_the_page_stands_alone_and_escapes_names():
    page = comparison.page([_entry("<b>", fd=1.0)], title="a & b", pictures={"Samples": np.zeros((4, 4), np.uint8)})
    assert "&lt;b&gt;" in page and "<b>" not in page and "a &amp; b" in page and "src='data:image/png;base64," in page
    assert not any(word in page for word in ("http:", "https:", "<script", "<link"))


def _args(**changes):
    return argparse.Namespace(**{**dict(ema=None, teacher=False, steps=None, guidance=1.0, churn=0.0), **changes})


def _loaded(plan=None, label_dim=0):
    return types.SimpleNamespace(few_step=plan, network=types.SimpleNamespace(label_dim=label_dim, text_dim=0, text_tokens=0))


def test_flags_become_samplers():
    few = FewStep((80.0, 2.0, 0.5))
    assert sampler_flags.spec(_args(), _loaded(few)).few_step == few
    assert sampler_flags.spec(_args(steps=2), _loaded(few)).few_step.sigmas == (80.0, 2.0)
    teacher = sampler_flags.spec(_args(churn=3.0, guidance=2.0), _loaded(label_dim=4))
    assert (teacher.num_steps, teacher.S_churn, teacher.guidance, teacher.calls) == (18, 3.0, 2.0, 70)


@pytest.mark.parametrize("changes, loaded, message", [
    (dict(steps=4), _loaded(FewStep((80.0, 2.0, 0.5))), "--steps: got 4, allowed: 1 to 3"),
    (dict(steps=2), _loaded(FewStep((2.5,))), "one-step"),
    (dict(churn=1.0), _loaded(FewStep((2.5,))), "--churn: got 1, allowed: 0"),
    (dict(steps=2), _loaded(), "odd numbers"),
    (dict(guidance=2.0), _loaded(), "takes no classes"),
])
def test_flags_that_do_not_fit(changes, loaded, message):
    with pytest.raises(ValueError, match=message):
        sampler_flags.spec(_args(**changes), loaded)
