"""Figures of several sets of images beside each other: Markdown for a terminal, one picture, one page that stands alone."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sim_jax import images
from sim_jax.report_style import CSS

PREVIEW = 10      # images of each set in the picture
# the figures of a table, in this order, and which way is better
_COLUMNS = {"calls": "calls", "count": "images", "fd": "FD ↓", "fd_mean": "FD, mean ↓", "fd_spread": "FD, spread", "fd_inf": "FD∞ ↓",
            "sfd": "sFD ↓", "kd": "KD ↓", "is": "IS ↑", "precision": "precision ↑", "recall": "recall ↑", "density": "density ↑",
            "coverage": "coverage ↑", "class_agreement": "class agreement ↑", "class_tv": "class imbalance ↓",
            "class_fd": "FD in classes ↓", "nearest_pixel_share": "close to data (pixels)",
            "nearest_feature_share": "close to data (features)", "copies": "copies"}


class Entry(NamedTuple):
    """One row: its name, {figure: value} with its `protocol`, and its first images uint8 [n,H,W,C] where there are any."""

    name: str
    figures: Mapping[str, Any]
    preview: np.ndarray | None = None


def number(value: Any) -> str:
    """Four digits of a float; whole numbers as they are; a dash for nothing."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) and not (value.is_integer() and abs(value) < 1e6) else f"{value:.0f}"


def _table(entries: Sequence[Entry]) -> tuple[list[str], list[list[str]]]:
    def get(entry: Entry, key: str) -> Any:
        return entry.figures.get(key, entry.figures.get("protocol", {}).get(key))

    keys = [key for key in _COLUMNS if any(get(entry, key) is not None for entry in entries)]
    return ["", *(_COLUMNS[key] for key in keys)], [[entry.name, *(number(get(entry, key)) for key in keys)] for entry in entries]


def markdown(entries: Sequence[Entry]) -> str:
    """A table, a row each; below it what differs between their protocols and what they share."""
    head, rows = _table(entries)
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    line = lambda row: "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |"
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    warning = _warning(entries)
    return "\n".join([line(head), rule, *map(line, rows), *(["", warning] if warning else [])])


def _warning(entries: Sequence[Entry]) -> str:
    """What makes the rows no fair comparison."""
    def differs(key: str) -> bool:
        return len({str(entry.figures.get("protocol", {}).get(key)) for entry in entries}) > 1

    names = {"features": "the features", "reference": "the reference", "count": "the number of images", "label_scheme": "the classes",
             "rounding": "the rounding"}
    found = [name for key, name in names.items() if differs(key)]
    return f"Not the same in all rows: {', '.join(found)}." if found else ""


def picture(entries: Sequence[Entry], *, count: int = PREVIEW) -> np.ndarray | None:
    """The first images of each, a row each with its name; uint8 [H,W,C], or None where there are none."""
    shown = [entry for entry in entries if entry.preview is not None]
    if not shown:
        return None
    height, width, channels = (max(entry.preview.shape[axis] for entry in shown) for axis in (1, 2, 3))

    def fit(batch: np.ndarray) -> np.ndarray:
        batch = np.repeat(batch[:count], channels // batch.shape[3], axis=3)
        extra = [(0, count - len(batch)), (0, height - batch.shape[1]), (0, width - batch.shape[2]), (0, 0)]
        return np.pad(batch, extra, constant_values=255)

    rows = np.concatenate([fit(entry.preview) for entry in shown])
    return images.grid(rows, columns=count, scale=None, row_labels=[entry.name for entry in shown])


def page(entries: Sequence[Entry], *, title: str, pictures: Mapping[str, np.ndarray]) -> str:
    """HTML with the table, the pictures and every protocol inside."""
    text = lambda value: html.escape(str(value))
    head, rows = _table(entries)
    body = "".join(f"<tr><th>{text(row[0])}</th>{''.join(f'<td>{text(cell)}</td>' for cell in row[1:])}</tr>" for row in rows)
    table = (f"<div class='table'><table><thead><tr>{''.join(f'<th>{text(cell)}</th>' for cell in head)}</tr></thead>"
             f"<tbody>{body}</tbody></table></div>")
    warning = f"<p class='warning'>{text(_warning(entries))}</p>" if _warning(entries) else ""
    shown = "".join(f"<h2>{text(name)}</h2><figure class='picture wide'><img alt='{text(name)}' src='data:image/png;base64,"
                    f"{base64.b64encode(images.png_bytes(pixels)).decode()}'></figure>" for name, pixels in pictures.items())
    about = "".join(f"<h2>{text(entry.name)}: how it was measured</h2><div class='table facts'><table><tbody>"
                    + "".join(f"<tr><td>{text(key.replace('_', ' '))}</td><td>{text(value)}</td></tr>"
                              for key, value in entry.figures.get("protocol", {}).items())
                    + "</tbody></table></div>" for entry in entries)
    return (f"<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width, "
            f"initial-scale=1'>\n<title>{text(title)}</title><style>{CSS}</style></head><body><main><h1>{text(title)}</h1>"
            f"{table}{warning}{shown}{about}</main></body></html>\n")
