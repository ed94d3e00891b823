"""The report: its figures are all there, strict, escaped, self-contained, and never half-written."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from sim_jax import report, report_curves

SUMMARY = {
    "method": "sim",
    "teacher": {"calls": 35, "fd": 0.8123, "class_agreement": 0.9913, "precision": 0.951, "recall": 0.902},
    "generator": {"calls": 1, "fd": np.float32(0.9747), "class_agreement": 0.9876, "precision": 0.942,
                  "recall": 0.874},
    "real_halves": {"fd": 0.6121},
    "protocol": {"samples": 5000, "reference_hash": "9f2c31d0", "features": "digits-64",
                 "ema": "half-life 0.5", "labels": "balanced"},
    "seconds": {"total": 301.7, "to_first_step": 14.2},
    "device": "2 CPU cores",
    "command": "python -m sim_jax.main --config=configs/digits.py --workdir=runs/digits",
    "versions": {"jax": "0.10.2"},
}
CONFIG = {"method": "sim", "optimizer": {"generator": {"lr": 0.000123456}}, "betas": (0.0, 0.999),
          "seed": 1234567}


def _rows(number=30):
    rows = []
    for i in range(number):
        row = {"step": i, "kimg": i * 0.064, "generator/loss": 1 / (i + 1), "generator/grad_norm": 1.0 + i,
               "fake_score/loss": 0.5, "fake_score/grad_norm": 2.0, "fake_score/lag": 0.1,
               "samples/mean": -0.2, "samples/mean_reference": -0.3, "images_per_second": 240.0, "custom": i}
        row |= {f"divergence/bin{b}_sigma{s}": 0.1 * (b + 1) for b, s in enumerate((0.01, 0.5, 80))}
        if i % 10 == 0:
            row |= {"fd/generator": 3.0, "fd/teacher": 0.8}
        rows.append(row)
    rows[3]["generator/loss"] = None
    return rows


def _picture(channels=1, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (19, 28, channels), dtype=np.uint8)


class _Page(HTMLParser):
    """Text, pictures, references and the nesting of a page."""

    void = {"meta", "img", "br", "link", "input"}

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.attributes, self.headings = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.attributes += [(tag, key, value or "") for key, value in attributes]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.attributes += [(tag, key, value or "") for key, value in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.texts.append(data)
        if self.open and self.open[-1] in ("h2", "h3"):
            self.headings.append(data)

    @property
    def text(self):
        return " ".join(self.texts)

    def values(self, *keys):
        return [value for _, key, value in self.attributes if key in keys]


def _write(workdir, **changes):
    given = dict(summary=SUMMARY, curves=_rows(), config=CONFIG, title="digits: SIM",
                 pictures={"teacher": _picture(), "generator": _picture(3), "progress/0 kimg": _picture(1, 1),
                           "progress/96 kimg": _picture(1, 2), "attention": _picture()[:, :, 0]})
    json_path, html_path = report.write_report(workdir, **(given | changes))
    return json.loads(json_path.read_text(), parse_constant=pytest.fail), _Page(html_path.read_text())


def test_json_is_the_summary_and_strict(tmp_path):
    changed = SUMMARY | {"teacher": {"calls": 35, "fd": math.nan}, "counts": np.arange(3),
                         "when": (1, np.int32(2))}
    written, page = _write(tmp_path, summary=changed)
    assert written["teacher"] == {"calls": 35, "fd": None}
    assert written["generator"]["fd"] == pytest.approx(0.9747) and written["generator"]["calls"] == 1
    assert written["real_halves"]["fd"] == 0.6121 and written["seconds"] == SUMMARY["seconds"]
    assert written["counts"] == [0, 1, 2] and written["when"] == [1, 2] and written["device"] == "2 CPU cores"
    assert "–" in page.text


def test_every_figure_is_on_the_page(tmp_path):
    _, page = _write(tmp_path)
    for figure in ("0.812", "0.975", "0.612", "99.1%", "98.8%", "95.1%", "94.2%", "90.2%", "87.4%", "35",
                   "1.20×", "5:02", "0:14", "301.7", "2 CPU cores", "9f2c31d0", "5000", "digits-64",
                   "half-life 0.5", "balanced", "jax 0.10.2", SUMMARY["command"], "optimizer.generator.lr",
                   "0.000123456",
                   "[0.0, 0.999]", "1234567"):
        assert figure in page.text, figure
    assert page.headings[:4] == ["Samples", "Final figures", "Along training", "Attention"]
    assert "0 kimg" in page.text and "96 kimg" in page.text


def test_every_metric_is_drawn_once_in_its_panel(tmp_path):
    rows = _rows()
    panels = report_curves.panels(rows)
    names = [line.name for panel in panels for line in panel.lines]
    assert sorted(names) == sorted({name for row in rows for name in row} - {"step", "kimg"})
    assert [(panel.title, len(panel.lines), panel.log) for panel in panels] == [
        ("Fréchet distance", 2, False), ("Score divergence by noise level", 3, True),
        ("Lag of the fake score", 1, False), ("Brightness of samples", 2, False),
        ("Loss: generator", 1, False), ("Loss: fake score", 1, False), ("Gradient norms", 2, True),
        ("Images per second", 1, False), ("Custom", 1, False)]
    assert [line.label for line in panels[1].lines] == ["σ 0.01", "σ 0.5", "σ 80"]
    assert [line.name for line in panels[3].lines if line.reference] == ["samples/mean_reference"]
    assert panels[4].not_finite == 1
    _, page = _write(tmp_path)
    assert [panel.title for panel in panels] == [h for h in page.headings if h in {p.title for p in panels}]
    assert "Recorded values that are not finite: 1." in page.text
    assert sorted(v for tag, key, v in page.attributes if tag == "span" and key == "title") == sorted(names)


def test_lines_pass_through_the_recorded_points(tmp_path):
    rows = [{"step": 0, "kimg": 0.0, "a": 1.0}, {"step": 1, "kimg": 2.0}, {"step": 2, "kimg": 4.0, "a": None},
            {"step": 3, "kimg": 6.0, "a": 3.0}]
    (panel,) = report_curves.panels(rows)
    np.testing.assert_array_equal(panel.lines[0].x, [0.0, 4.0, 6.0])
    np.testing.assert_array_equal(panel.lines[0].y, [1.0, math.nan, 3.0])
    assert panel.unit == "kimg"
    assert report_curves.panels([{"step": 1, "kimg": 0.0, "a": 1.0}])[0].unit == "step"


def test_teacher_alone_is_a_curve_not_a_reference():
    (panel,) = report_curves.panels([{"step": 1, "kimg": 0.1, "fd/teacher": 1.0}])
    assert not panel.lines[0].reference


def test_page_refers_to_nothing_outside(tmp_path):
    _write(tmp_path)
    text = (tmp_path / "report.html").read_text()
    page = _Page(text)
    for value in page.values("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
        assert value.startswith(("data:image/png;base64,", "#")), value
    assert not re.search(r"https?:|//\w|@import|<script|<link|url\((?!#)", re.sub(r"base64,[^\"]*", "", text))


def test_drawings_share_no_identifier_and_all_resolve(tmp_path):
    _, page = _write(tmp_path)
    identifiers = page.values("id")
    assert identifiers and len(identifiers) == len(set(identifiers))
    used = [value[1:] for value in page.values("href")]
    used += [found for value in page.values("clip-path", "style")
             for found in re.findall(r"url\(#([^)]*)\)", value)]
    assert used and set(used) <= set(identifiers)


def test_pictures_are_inside_bit_by_bit(tmp_path):
    _, page = _write(tmp_path)
    stored = [np.asarray(Image.open(io.BytesIO(base64.b64decode(value.split(",")[1])))) for value in
              page.values("src")]
    wanted = [_picture(), _picture(3), _picture(1, 1), _picture(1, 2), _picture()]       # teacher first
    assert len(stored) == len(wanted)
    for have, want in zip(stored, wanted, strict=True):
        np.testing.assert_array_equal(have.reshape(want.shape), want)
    widths, heights = ([int(value) for tag, key, value in page.attributes if (tag, key) == ("img", which)]
                       for which in ("width", "height"))
    assert len(widths) == 5 and min(widths) >= 420         # enlarged, by whole factors, the same both ways
    assert all(w % 28 == 0 and w // 28 * 19 == h for w, h in zip(widths, heights, strict=True))
    assert "image-rendering: pixelated" in (tmp_path / "report.html").read_text()


def test_everything_is_escaped(tmp_path):
    evil = "<script>alert(1)</script>\"'&"
    summary = SUMMARY | {"device": evil, evil: {"fd": 1.0, evil: evil}, "command": evil,
                         "protocol": {evil: evil}, "versions": {evil: evil}, "other": {evil: evil}}
    _, page = _write(tmp_path, title=evil, config={evil: evil, "nested": {evil: evil}}, summary=summary,
                     curves=[{"step": 1, "kimg": 1.0, evil: 1.0, f"divergence/{evil}": 1.0}],
                     pictures={evil: _picture(), f"progress/{evil}": _picture()})
    assert not any(tag == "script" for tag, _, _ in page.attributes)
    assert "<script" not in (tmp_path / "report.html").read_text()
    assert page.text.count(evil) >= 10


def test_a_teachers_training_has_no_generator(tmp_path):
    rows = [{"step": i, "kimg": float(i), "teacher/loss": 1.0} for i in range(1, 3)]
    written, page = _write(tmp_path, summary={"teacher": SUMMARY["teacher"], "seconds": {"total": 9}},
                           curves=rows, config={}, pictures={"teacher": _picture(), "real": _picture()})
    assert "generator" not in written
    assert "generator" not in page.text.lower()
    assert "Loss: teacher" in page.headings


def test_an_empty_run_still_gives_a_page(tmp_path):
    written, page = _write(tmp_path, summary={}, curves=[], pictures={}, config={}, title="")
    assert written == {} and page.headings == []


def test_long_and_broken_curves_are_drawn_small(tmp_path):
    rows = [{"step": i, "kimg": i * 0.1, "generator/loss": math.nan,
             "fake_score/loss": math.inf if i < 9 else 1e-3} for i in range(20_000)]
    for index, panel in enumerate(report_curves.panels(rows)):
        assert panel.not_finite in (20_000, 9)
        assert len(report_curves.svg(panel, index=index)) < 40_000


def test_averaged_points_keep_the_mean_and_the_gaps():
    x, y = np.arange(2400.0), np.arange(2400.0)
    y[5], y[20:30] = math.nan, math.nan
    thin_x, thin_y = report_curves._thin(x, y)
    assert len(thin_x) == 240 and thin_x[0] == 4.5 and thin_y[1] == 14.5
    assert thin_y[0] == pytest.approx(np.mean([0, 1, 2, 3, 4, 6, 7, 8, 9])) and math.isnan(thin_y[2])


def test_failing_write_leaves_the_old_report(tmp_path, monkeypatch):
    _write(tmp_path)
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report.files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        _write(tmp_path, title="new")
    with pytest.raises(ValueError, match="picture: got float64"):
        _write(tmp_path, pictures={"teacher": np.zeros((3, 3))})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old


def test_unwritable_workdir_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="workdir: got .*file"):
        _write(tmp_path / "file")


def test_matplotlib_is_imported_only_to_draw():
    code = ("import sys, sim_jax.report, sim_jax.metrics; "
            "sys.exit(any(name in sys.modules for name in ('matplotlib', 'tensorboardX', 'tqdm')))")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
