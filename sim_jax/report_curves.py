"""The report's curves: metrics are sorted into panels by their names and drawn as SVG to put into the page.

The SVG's text and axes have the colour of the page around them (`currentColor`), so that one drawing serves a
light and a dark page; lines have middle tones that are legible on both.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_INK = "#0a0b0c"               # stands for the page's text colour until the SVG is written
_MOST_POINTS = 240             # of a line; longer ones are averaged in runs
_LOG_FROM = 30.0               # positive figures that span this factor get a logarithmic axis
_SIZE = (5.2, 2.55)            # inches; the page scales it
_COLOURS = ("#3f7fe0", "#e0762f", "#2fa084", "#b45fc4", "#c9a227", "#d65a6b", "#6b7f99", "#4fae3f")
_ROLES = {"generator": "#3f7fe0", "fake_score": "#e0762f", "discriminator": "#2fa084", "teacher": "#3f7fe0"}
_RAMP = ((63, 115, 224), (164, 88, 196), (222, 92, 92), (212, 150, 40))      # low to high noise level
_REFERENCE = re.compile(r"[_/](reference|teacher|real|real_halves)$")

# (pattern of the metric's name, title, what to look for, axis); the first that matches wins, in this order on
# the page. "{0}" in a title is the name's first part.
_PANELS: tuple[tuple[str, str, str, str], ...] = (
    (r"fd/", "Fréchet distance",
     "Lower is better. The dashed line is the level to reach.", "auto"),
    (r"divergence/", "Score divergence by noise level",
     "Squared distance between fake and teacher scores on fixed held-out noise. It should fall at every "
     "level; one that turns upwards says at which scale the samples drift.", "log"),
    (r"fake_score/lag", "Lag of the fake score",
     "How far the fake score is behind the generator it follows. Low and flat: it keeps up; rising: train it "
     "more often or faster.", "auto"),
    (r"samples/mean", "Brightness of samples",
     "Mean pixel on fixed noise. It should stay near the dashed reference.", "linear"),
    (r"samples/std", "Contrast of samples",
     "Standard deviation within an image. It should stay near the dashed reference.", "linear"),
    (r"samples/diversity", "Diversity of samples",
     "Standard deviation across images. Towards zero: all samples become alike.", "linear"),
    (r"(\w+/)?loss", "Loss: {0}", "", "auto"),
    (r".*grad_norm", "Gradient norms",
     "Spikes go before trouble; a slow decline is normal.", "log"),
    (r"images_per_second", "Images per second", "Without pauses for evaluation.", "linear"),
)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One metric over the run: x in kimg (or steps), y as recorded; NaN where it was not finite."""

    name: str
    label: str
    x: np.ndarray
    y: np.ndarray
    reference: bool = False
    colour: str = _COLOURS[0]

    @property
    def last(self) -> float:
        return float(self.y[-1])


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Lines that share a pair of axes."""

    title: str
    note: str
    log: bool
    unit: str
    lines: list[Line] = field(default_factory=list)

    @property
    def not_finite(self) -> int:
        """How many recorded figures are NaN or infinite."""
        return int(sum((~np.isfinite(line.y)).sum() for line in self.lines))


def _words(name: str) -> str:
    return name.replace("_", " ").replace("/", " ").strip()


def _panel_of(name: str) -> tuple[int, str, str, str]:
    """Rank on the page, title, note and axis of the panel that a metric belongs to."""
    first = name.split("/")[0]
    for rank, (pattern, title, note, axis) in enumerate(_PANELS):
        if re.match(pattern, name):
            return rank, title.format(_words(first)), note, axis
    return len(_PANELS), _words(first).capitalize(), "", "auto"


def _label(name: str, title: str) -> str:
    """What the legend says: the part of the name that the title does not say already."""
    sigma = re.search(r"sigma_?([\d.eE+-]+)$", name)
    if sigma:
        return f"σ {sigma[1]}"
    parts = name.split("/")
    if parts[-1].startswith("grad_norm"):
        return _words(name.replace("grad_norm", ""))
    if title.endswith("of samples"):
        return "reference" if _REFERENCE.search(name) else "samples"
    return _words(parts[-1])


def _natural(name: str) -> list[Any]:
    """Sorts bin2 before bin10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]


def _ramp(share: float) -> str:
    place = share * (len(_RAMP) - 1)
    low = min(int(place), len(_RAMP) - 2)
    mixed = [a + (b - a) * (place - low) for a, b in zip(_RAMP[low], _RAMP[low + 1], strict=True)]
    return "#" + "".join(f"{round(part):02x}" for part in mixed)


def _colours(names: Sequence[str], title: str) -> list[str]:
    """A ramp for noise levels, fixed colours for roles, a palette else."""
    if title == "Score divergence by noise level":
        return [_ramp(index / max(len(names) - 1, 1)) for index in range(len(names))]
    roles = [_ROLES.get(name.split("/")[0]) for name in names]
    if all(roles) and len(set(roles)) == len(roles):
        return roles
    return [_COLOURS[index % len(_COLOURS)] for index in range(len(names))]


def panels(rows: Iterable[Mapping[str, Any]]) -> list[Panel]:
    """Sorts every metric of the rows (as in metrics.jsonl; None and NaN alike) into panels."""
    rows = list(rows)
    unit = "kimg" if len({row.get("kimg") for row in rows}) > 1 else "step"
    series: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        for name in row.keys() - {"step", "kimg"}:
            xs, ys = series.setdefault(name, ([], []))
            xs.append(float(row[unit]))
            ys.append(math.nan if row[name] is None else float(row[name]))
    groups: dict[tuple[int, str, str, str], list[str]] = {}
    for name in sorted(series, key=_natural):
        groups.setdefault(_panel_of(name), []).append(name)
    out = []
    roles = [f"Loss: {_words(role)}" for role in _ROLES]
    order = sorted(groups, key=lambda key: (key[0], roles.index(key[1]) if key[1] in roles else 9, key[1]))
    for _, title, note, axis in order:
        names = groups[_, title, note, axis]
        references = {name for name in names if _REFERENCE.search(name)}
        references = references if len(references) < len(names) else set()     # nothing to compare: a curve
        lines = [Line(name=name, label=_label(name, title), x=np.asarray(series[name][0]),
                      y=np.asarray(series[name][1]), reference=name in references, colour=colour)
                 for name, colour in zip(names, _colours(names, title), strict=True)]
        out.append(Panel(title=title, note=note, log=_is_log(axis, lines), unit=unit, lines=lines))
    return out


def _is_log(axis: str, lines: Sequence[Line]) -> bool:
    values = np.concatenate([line.y for line in lines])
    values = values[np.isfinite(values)]
    if axis == "linear" or not len(values) or values.min() <= 0:
        return False
    return axis == "log" or bool(values.max() > _LOG_FROM * values.min())


def _mean(values: np.ndarray) -> float:
    """Mean of the finite values, NaN where there are none."""
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else math.nan


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over runs of neighbours, so that a long run's page stays small; a run of NaNs stays a gap."""
    if len(x) <= _MOST_POINTS:
        return x, y
    parts = np.array_split(np.arange(len(x)), _MOST_POINTS)
    return np.asarray([x[part].mean() for part in parts]), np.asarray([_mean(y[part]) for part in parts])


def _smooth(y: np.ndarray) -> np.ndarray:
    """Centred mean over about a thirtieth of the line, NaN left out."""
    half = len(y) // 60
    return np.asarray([_mean(y[max(0, i - half):i + half + 1]) for i in range(len(y))])


def _draw(axes: Any, line: Line) -> None:
    x, y = _thin(line.x, line.y)
    if line.reference:
        axes.plot(x, y, color="#8b8f98", linewidth=1.5, dashes=(4, 3), zorder=1)
        if len(x) == 1:
            axes.axhline(y[0], color="#8b8f98", linewidth=1.5, dashes=(4, 3), zorder=1)
    elif len(x) > 60:
        axes.plot(x, y, color=line.colour, linewidth=0.8, alpha=0.35)
        axes.plot(x, _smooth(y), color=line.colour, linewidth=1.7)
    else:
        marker = "o" if len(x) <= 25 else None
        axes.plot(x, y, color=line.colour, linewidth=1.7, marker=marker, markersize=3.2)


def _style(axes: Any, panel: Panel) -> None:
    """Few lines, all in the page's own colour."""
    from matplotlib import ticker
    if panel.log:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        subs = (1.0, 2.0, 5.0) if high < 30 * low else (1.0, 3.0) if high < 1000 * low else (1.0,)
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=subs, numticks=8))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:.4g}"))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:.5g}"))
    axes.set_xlabel(panel.unit, color=_INK, fontsize=9)
    axes.tick_params(colors=_INK, labelsize=9, length=0)
    axes.grid(axis="y", color=_INK, alpha=0.12, linewidth=0.8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set(color=_INK, alpha=0.35)
    axes.margins(x=0.01)


def svg(panel: Panel, *, index: int) -> str:
    """A panel as an `<svg>` element to put into HTML.

    Needs no display, and neither the page nor the drawing refers to anything outside.

    Args:
      panel: what to draw; lines of another length than two points and up are drawn as dots.
      index: its place in the page, which keeps the drawing's identifiers apart from other drawings'.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": f"sim_jax-{index}"}):
        figure = Figure(figsize=_SIZE, layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        for line in panel.lines:
            _draw(axes, line)
        _style(axes, panel)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return _for_html(buffer.getvalue(), prefix=f"c{index}-", title=panel.title)


def _for_html(text: str, *, prefix: str, title: str) -> str:
    """Takes out of a whole SVG file what HTML does not need; makes its identifiers its own."""
    text = text[text.index("<svg"):].strip()
    for waste in (r"<metadata>.*?</metadata>", r"<style.*?</style>", r' (xmlns(:\w+)?|version)="[^"]*"',
                  r" font-family: [^;\"]*;"):
        text = re.sub(waste, "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{prefix}', text.replace("xlink:href", "href"))
    text = text.replace('href="#', f'href="#{prefix}').replace("url(#", f"url(#{prefix}")
    box = re.search(r'viewBox="[^"]*"', text)[0]
    head = f'<svg {box} role="img" aria-label="{html.escape(title)}">'
    return head + text[text.index(">") + 1:].replace(_INK, "currentColor")
