"""A run on one page: report.json for programs, report.html for people.

The page stands alone: style, curves and pictures are inside, nothing is loaded. What is shown follows from
what is given: a distillation has a generator beside its teacher, a teacher's training (denoising score
matching) has a teacher only.

The summary is a nested dict. Its entries that are dicts with figures of samples (`teacher`, `generator`,
`real_halves`, and any other with `fd` or `calls`) become rows of the table of final figures; `seconds`
(`total`, `to_first_step`), `device`, `command`, `versions` and `protocol` have their places; the rest is
listed.
"""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sim_jax import files, images, report_curves
from sim_jax.progress import clock_text
from sim_jax.report_style import CSS

_ROWS = {"teacher": "Teacher", "generator": "Generator",
         "real_halves": "Real data, one half against the other"}
_COLUMNS = {"calls": "Network calls", "fd": "Fréchet distance ↓", "class_agreement": "Class agreement ↑",
            "precision": "Precision ↑", "recall": "Recall ↑"}
_SHARES = ("class_agreement", "precision", "recall")
_PLACED = ("protocol", "seconds", "command", "versions", "device")
_WIDEST = {"pair": 500, "wide": 1040, "strip": 900}        # pixels that a picture may take


def plain(value: Any) -> Any:
    """A value as strict JSON has it: numpy and JAX numbers and arrays as numbers and lists, NaN as None.

    Anything else that JSON does not know becomes its text.
    """
    if hasattr(value, "to_dict"):                                   # a ConfigDict
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(entry) for entry in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def write_report(workdir: str | Path, *, summary: Mapping[str, Any], curves: Iterable[Mapping[str, Any]] = (),
                 pictures: Mapping[str, np.ndarray] | None = None, config: Mapping[str, Any] | None = None,
                 title: str = "") -> tuple[Path, Path]:
    """Writes workdir/report.json (the summary) and workdir/report.html, each atomically.

    Args:
      summary: nested dict of final figures, as in the module's docstring. A figure that is not finite becomes
        null, and a dash on the page.
      curves: rows of metrics.jsonl (`metrics.read_metrics`); they may differ in their names.
      pictures: uint8 grids [H, W] or [H, W, C] by name. `teacher` and `generator` (and `real`) stand beside
        each other at the top; `progress`, or `progress/CAPTION` one a row, shows training; others follow.
      config: the resolved config, nested.
      title: the page's title, say "digits: SIM, one call".

    Returns: the paths of the two files.
    Raises: ValueError for pictures of another type or a workdir that cannot be written.
    """
    summary, workdir = plain(summary), files.make_folder(workdir)
    text = json.dumps(summary, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    page = _page(summary, list(curves), dict(pictures or {}), plain(config or {}), title or "Report")
    paths = [files.write_atomically(workdir / name, lambda file, data=data: file.write(data), key="workdir")
             for name, data in (("report.json", text.encode()), ("report.html", page.encode()))]
    return paths[0], paths[1]


def _page(summary: dict[str, Any], curves: list[Mapping[str, Any]], pictures: dict[str, np.ndarray],
          config: dict[str, Any], title: str) -> str:
    sections = [_head(summary, title), _samples(pictures, summary), _final_figures(summary),
                _progress(pictures), _other_pictures(pictures), _curves(curves), _run(summary),
                _config(config)]
    return "\n".join(["<!DOCTYPE html>", '<html lang="en"><head><meta charset="utf-8">',
                      '<meta name="viewport" content="width=device-width, initial-scale=1">',
                      f"<title>{_escape(title)}</title><style>{CSS}</style></head><body><main>",
                      *filter(None, sections),
                      "<footer>Written by sim_jax; the same figures are in report.json, every logged value "
                      "in metrics.jsonl.</footer></main></body></html>", ""])


def _escape(value: Any) -> str:
    return html.escape(str(value))


def _number(value: Any, key: str = "") -> str:
    """A figure for people: four digits, shares in percent, a dash where there is none."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if key in _SHARES:
        return f"{100 * value:.1f}%"
    if isinstance(value, int) or (value == int(value) and 1000 <= abs(value) < 1e15):
        return f"{int(value):,}" if abs(value) >= 10_000 else str(int(value))
    return f"{value:.3g}" if abs(value) < 10 else f"{value:.4g}"


def _exact(value: Any) -> str:
    """A config's value as it is, nothing rounded."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _row_names(summary: Mapping[str, Any]) -> list[str]:
    """The summary's entries that are rows of the table: the known ones first."""
    rows = [name for name, entry in summary.items()
            if isinstance(entry, dict) and name not in _PLACED
            and (name in _ROWS or entry.keys() & {"fd", "calls"})
            and any(value is not None for value in entry.values())]
    return [name for name in _ROWS if name in rows] + [name for name in rows if name not in _ROWS]


def _get(summary: Mapping[str, Any], role: str, key: str) -> float | None:
    """A number of the summary, or None."""
    entry = summary.get(role)
    value = entry.get(key) if isinstance(entry, dict) else None
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _head(summary: Mapping[str, Any], title: str) -> str:
    """Title, one sentence that says how it went, and the headline figures."""
    cards = []
    for role in ("generator", "teacher"):
        fd, calls = _get(summary, role, "fd"), _get(summary, role, "calls")
        if fd is not None:
            cards.append((_number(fd), f"{_ROWS[role]}'s Fréchet distance" + _in_calls(calls)))
    generator, teacher = _get(summary, "generator", "fd"), _get(summary, "teacher", "fd")
    if generator is not None and teacher:
        cards.insert(1, (f"{generator / teacher:.2f}×", "of the teacher's distance"))
    main = "generator" if "generator" in summary else "teacher"
    agreement = _get(summary, main, "class_agreement")
    if agreement is not None:
        cards.append((_number(agreement, "class_agreement"), "of samples are of the class asked for"))
    total = _get(summary, "seconds", "total")
    if total is not None:
        first = _get(summary, "seconds", "to_first_step")
        name = "in all" if first is None else f"in all, {clock_text(first)} to the first step"
        cards.append((clock_text(total), name))
    inside = "".join(f'<div class="card"><div class="value">{_escape(value)}</div>'
                     f'<div class="name">{_escape(name)}</div></div>' for value, name in cards)
    return (f'<header><h1>{_escape(title)}</h1>{_lead(summary)}'
            + (f'<div class="cards">{inside}</div>' if cards else "") + "</header>")


def _in_calls(calls: float | None) -> str:
    return "" if calls is None else f" in {_number(calls)} call{'' if calls == 1 else 's'}"


def _lead(summary: Mapping[str, Any]) -> str:
    generator, teacher = _get(summary, "generator", "fd"), _get(summary, "teacher", "fd")
    floor = _get(summary, "real_halves", "fd")
    last = "" if floor is None else f"; two halves of the real data stand {_number(floor)} apart"
    if generator is not None and teacher is not None:
        sentence = (f"The generator's samples{_in_calls(_get(summary, 'generator', 'calls'))} stand at a "
                    f"Fréchet distance of {_number(generator)} from the real data, the teacher's"
                    f"{_in_calls(_get(summary, 'teacher', 'calls'))} at {_number(teacher)}{last}.")
    elif teacher is not None:
        sentence = (f"The teacher's samples{_in_calls(_get(summary, 'teacher', 'calls'))} stand at a Fréchet "
                    f"distance of {_number(teacher)} from the real data{last}.")
    else:
        return ""
    return f'<p class="lead">{_escape(sentence)}</p>'


def _image(picture: np.ndarray, *, alt: str, place: str) -> str:
    """An <img> with the PNG inside, enlarged by a whole factor to what its place has room for."""
    picture = np.asarray(picture)
    data = base64.b64encode(images.png_bytes(picture)).decode()
    scale = max(1, _WIDEST[place] // picture.shape[1])
    height, width = picture.shape[0] * scale, picture.shape[1] * scale
    return (f'<img alt="{_escape(alt)}" width="{width}" height="{height}" '
            f'src="data:image/png;base64,{data}">')


def _samples(pictures: Mapping[str, np.ndarray], summary: Mapping[str, Any]) -> str:
    """Teacher and generator, and real images where given, beside each other."""
    names = [name for name in ("teacher", "generator", "real") if name in pictures]
    if not names:
        return ""
    figures = []
    for name in names:
        calls, fd = _get(summary, name, "calls"), _get(summary, name, "fd")
        facts = [_in_calls(calls).removeprefix(" in ")] if calls is not None else []
        facts += [f"FD {_number(fd)}"] if fd is not None else []
        figures.append(f'<figure class="picture"><figcaption><b>{name.capitalize()}</b>'
                       f'<span>{_escape(", ".join(facts))}</span></figcaption>'
                       + _image(pictures[name], alt=f"Samples: {name}", place="pair") + "</figure>")
    both = {"teacher", "generator"} <= set(names)
    note = "The same place has the same noise and the same label." if both else "Of the last checkpoint."
    return (f'<section><h2>Samples</h2><p class="soft">{note}</p>'
            f'<div class="pair">{"".join(figures)}</div></section>')


def _final_figures(summary: Mapping[str, Any]) -> str:
    rows = _row_names(summary)
    if not rows:
        return ""
    present = {key: None for row in rows for key in summary[row]}
    columns = [key for key in _COLUMNS if key in present] + [key for key in present if key not in _COLUMNS]
    head = "".join(f"<th>{_escape(_COLUMNS.get(key, key.replace('_', ' ')))}</th>" for key in columns)
    body = ""
    for row in rows:
        cells = "".join(f"<td>{_escape(_number(summary[row].get(key), key))}</td>" for key in columns)
        name = _ROWS.get(row, row.replace("_", " "))
        body += f'<tr class="{_escape(row)}"><th>{_escape(name)}</th>{cells}</tr>'
    protocol = summary.get("protocol") or {}
    entries = (f"{key.replace('_', ' ')}: {_number(value)}" for key, value in _flat(protocol))
    line = "".join(f"<span>{_escape(entry)}</span>" for entry in entries)
    return ('<section><h2>Final figures</h2><div class="table"><table>'
            f'<thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
            + (f'<p class="soft protocol">{line}</p>' if line else "") + "</section>")


def _progress(pictures: Mapping[str, np.ndarray]) -> str:
    """The generator's samples along training: one picture, or a row per moment."""
    rows = {name.removeprefix("progress/"): picture for name, picture in pictures.items()
            if name.startswith("progress/")}
    inside = ""
    if "progress" in pictures:
        picture = _image(pictures["progress"], alt="Progress", place="wide")
        inside += f'<figure class="picture wide">{picture}</figure>'
    if rows:
        inside += '<figure class="picture wide"><div class="strip">' + "".join(
            f"<span>{_escape(caption)}</span>{_image(picture, alt=caption, place='strip')}"
            for caption, picture in rows.items()) + "</div></figure>"
    return inside and ('<section><h2>Along training</h2><p class="soft">Samples from the same noise and '
                       f"labels as training goes on.</p>{inside}</section>")


def _other_pictures(pictures: Mapping[str, np.ndarray]) -> str:
    names = [name for name in pictures if name not in ("teacher", "generator", "real", "progress")
             and not name.startswith("progress/")]
    return "".join(f'<section><h2>{_escape(name.replace("_", " ").capitalize())}</h2>'
                   f'<figure class="picture wide">{_image(pictures[name], alt=name, place="wide")}</figure>'
                   "</section>"
                   for name in names)


def _curves(rows: list[Mapping[str, Any]]) -> str:
    drawn = "".join(_panel(panel, index) for index, panel in enumerate(report_curves.panels(rows)))
    return drawn and f'<section><h2>Curves</h2><div class="panels">{drawn}</div></section>'


def _panel(panel: report_curves.Panel, index: int) -> str:
    legend = "".join(f'<span title="{_escape(line.name)}"><i style="background: '
                     f'{"#8b8f98" if line.reference else line.colour}"></i>{_escape(line.label)}'
                     f"<em>{_escape(_number(plain(line.last)))}</em></span>" for line in panel.lines)
    warning = (f'<p class="warning">Recorded values that are not finite: {panel.not_finite}.</p>'
               if panel.not_finite else "")
    note = f'<p class="soft">{_escape(panel.note)}</p>' if panel.note else ""
    return (f'<div class="panel"><h3>{_escape(panel.title)}</h3>{note}{report_curves.svg(panel, index=index)}'
            f'{warning}<div class="legend">{legend}</div></div>')


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """A nested dict as dotted names and leaves, in order."""
    if not isinstance(value, dict) or (prefix and not value):
        return [(prefix, value)]
    start = f"{prefix}." if prefix else ""
    return [leaf for key, entry in value.items() for leaf in _flat(entry, start + key)]


def _facts(pairs: Iterable[tuple[str, Any]]) -> str:
    rows = "".join(f"<tr><td>{_escape(name)}</td><td>{_escape(_exact(value))}</td></tr>"
                   for name, value in pairs)
    return f'<div class="table facts"><table><tbody>{rows}</tbody></table></div>'


def _run(summary: Mapping[str, Any]) -> str:
    """The command, the machine, the time, package versions, and what the summary holds besides."""
    rows = _row_names(summary)
    pairs = [leaf for name in ("device", "seconds") if name in summary for leaf in _flat(summary[name], name)]
    pairs += [leaf for name, entry in summary.items() if name not in rows and name not in _PLACED
              for leaf in _flat(entry, name)]
    if summary.get("versions"):
        versions = (f"{name} {version}" for name, version in _flat(summary["versions"]))
        pairs.append(("versions", ", ".join(versions)))
    inside = f'<pre>{_escape(summary["command"])}</pre>' if summary.get("command") else ""
    inside += _facts(pairs) if pairs else ""
    return inside and f"<section><h2>Run</h2>{inside}</section>"


def _config(config: Mapping[str, Any]) -> str:
    if not config:
        return ""
    leaves = _flat(config)
    return (f"<section><h2>Config</h2><details><summary>All keys <span>{len(leaves)}</span></summary>"
            f"{_facts(leaves)}</details></section>")
