"""What a checkpoint holds, as plain rows and arrays: for notebooks, without building the training job.

Names, shapes, types and where each array lay come from the checkpoint's own metadata; values are read straight to the host, a few at a
time, so that neither the devices it was saved on nor their number are needed. Nothing in the workdir is changed.

    step, rows = inspection.table("runs/digits")                                  one Row per array; reads no values
    rows = inspection.measure("runs/digits", "generator/params", step=step)       with norms, and how far each average is
    counts, edges = inspection.histogram(inspection.read("runs/digits", ["generator/params/dec/..."])[0])
"""

from __future__ import annotations

import math
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from sim_jax import saved, step_folders

_PIECE = 1 << 28      # bytes that are read at a time


class Row(NamedTuple):
    """One array of a checkpoint.

    Attributes:
      name: its path, "generator/params/enc/8x8_conv/weight".
      shape, dtype: of the whole array.
      spec: what it was cut over when it was saved, axis by axis: "-, -, -, fsdp"; "" for copies.
      bytes: of the whole array.
      bytes_per_device: on each device that it was saved from.
      norm: the square root of the sum of squares; None where nobody asked.
      rms, largest: root mean square and largest magnitude of its numbers.
      ema_distance: {average: |average - raw| / |raw|} of raw parameters that have averages.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    spec: str
    bytes: int
    bytes_per_device: int
    norm: float | None = None
    rms: float | None = None
    largest: float | None = None
    ema_distance: Mapping[str, float] = {}


def steps(workdir: str | pathlib.Path) -> list[int]:
    """The complete checkpoints of a workdir, ascending. Raises: ValueError for a folder without any."""
    folder = pathlib.Path(workdir) / "checkpoints"
    found = step_folders.steps(folder)
    if not found:
        raise ValueError(f"workdir: got {str(workdir)!r}, which has no checkpoints, allowed: the workdir of a run")
    return found


def _folder(workdir: str | pathlib.Path, step: int | None) -> tuple[int, pathlib.Path]:
    there = steps(workdir)
    step = there[-1] if step is None else step
    if step not in there:
        raise ValueError(f"step: got {step}, allowed: {', '.join(map(str, there))}")
    return step, pathlib.Path(workdir).absolute() / "checkpoints" / str(step) / "state"


def _metadata(folder: pathlib.Path) -> dict[str, Any]:
    saved.be_quiet()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        tree = dict(reader.metadata(folder).item_metadata.tree)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    return {name: leaf for name, leaf in named.items() if getattr(leaf, "shape", None) is not None}


def _row(name: str, leaf: Any) -> Row:
    size = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
    where = leaf.sharding
    spec = tuple(getattr(where, "partition_spec", None) or ())
    axes = [() if part is None else (part,) if isinstance(part, str) else tuple(part) for part in spec]
    sizes = dict(zip(getattr(where, "axis_names", ()), np.ravel(getattr(where, "shape", ())).tolist()))
    pieces = math.prod(sizes[axis] for part in axes for axis in part)
    text = ", ".join("*".join(part) or "-" for part in axes) if any(axes) else ""
    return Row(name, tuple(leaf.shape), np.dtype(leaf.dtype).name, text, size, size // pieces)


def table(workdir: str | pathlib.Path, pattern: str = "", *, step: int | None = None) -> tuple[int, list[Row]]:
    """(step, a Row for every array whose name the regex `pattern` finds). Reads no values.

    Args:
      step: of the checkpoint; None is the newest.
    Raises: ValueError for a workdir without checkpoints, a step that is not there, or a pattern that is no regex or finds nothing.
    """
    step, folder = _folder(workdir, step)
    try:
        rows = [_row(name, leaf) for name, leaf in sorted(_metadata(folder).items()) if re.search(pattern, name)]
    except re.error as error:
        raise ValueError(f"pattern: got {pattern!r} ({error}), allowed: a regular expression") from None
    if not rows:
        raise ValueError(f"pattern: got {pattern!r}, which finds none of the arrays; allowed: such as 'generator/params'")
    return step, rows


def read(workdir: str | pathlib.Path, names: Iterable[str], *, step: int | None = None) -> list[np.ndarray]:
    """Arrays by their names, whole, on the host. Raises: ValueError for a name that is not there, or a damaged file."""
    _, folder = _folder(workdir, step)
    return _read(folder, _metadata(folder), list(names))


def _read(folder: pathlib.Path, known: Mapping[str, Any], names: list[str]) -> list[np.ndarray]:
    item: dict[str, Any] = {}
    for name in names:
        if name not in known:
            raise ValueError(f"name: got {name!r}, allowed: a name of inspection.table of {folder.parents[2]}")
        *path, last = name.split("/")
        branch = item
        for key in path:
            branch = branch.setdefault(key, {})
        branch[last] = jax.ShapeDtypeStruct(known[name].shape, known[name].dtype)
    kinds = jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray), item)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            tree = reader.restore(folder, args=ocp.args.PyTreeRestore(item=item, restore_args=kinds, partial_restore=True))
    except Exception as error:  # orbax raises many types for damaged files
        raise ValueError(f"checkpoint {folder.parent}: cannot be read ({' '.join(str(error).split())[:200]})") from error
    out = []
    for name in names:
        leaf = tree
        for key in name.split("/"):
            leaf = leaf[key]
        out.append(np.asarray(leaf))
    return out


def measure(workdir: str | pathlib.Path, prefix: str = "generator/params", *, step: int | None = None) -> list[Row]:
    """`table` of one network's raw parameters (or of anything else under `prefix`) with norms and distances of their averages."""
    step, rows = table(workdir, f"^{re.escape(prefix)}(/|$)", step=step)
    _, folder = _folder(workdir, step)
    known = _metadata(folder)
    owner, _, rest = prefix.partition("/")
    averages = sorted({name.split("/")[2] for name in known if name.startswith(f"{owner}/ema/")}) if rest.split("/")[0] == "params" else []
    out = []
    for piece in _pieces(rows, 1 + len(averages)):
        names = {"raw": [row.name for row in piece],
                 **{average: [row.name.replace("/params/", f"/ema/{average}/", 1) for row in piece] for average in averages}}
        values = iter(_read(folder, known, [name for part in names.values() for name in part]))
        means = {part: [next(values) for _ in piece] for part in names}
        for i, row in enumerate(piece):
            raw = np.asarray(means["raw"][i], np.float64)
            norm = float(np.linalg.norm(raw))
            distance = {average: float(np.linalg.norm(means[average][i] - raw) / max(norm, 1e-30)) for average in averages}
            out.append(row._replace(norm=norm, rms=norm / max(raw.size, 1) ** 0.5, largest=float(np.max(np.abs(raw), initial=0.0)),
                                    ema_distance=distance))
    return out


def _pieces(rows: Sequence[Row], copies: int) -> Iterable[list[Row]]:
    piece, size = [], 0
    for row in rows:
        if piece and (size + row.bytes) * copies > _PIECE:
            yield piece
            piece, size = [], 0
        piece.append(row)
        size += row.bytes
    yield piece


class Group(NamedTuple):
    """Arrays that belong together: "generator/ema/ema_6k"."""

    name: str
    arrays: int
    numbers: int
    bytes: int
    bytes_per_device: int


def groups(rows: Iterable[Row]) -> list[Group]:
    """Rows summed up by network and part (params, each average, opt_state), and a last one of all."""
    rows = list(rows)
    found: dict[str, list[Row]] = {}
    for row in rows:
        parts = row.name.split("/")
        depth = 3 if parts[1:2] == ["ema"] else 2
        found.setdefault("/".join(parts[:depth]), []).append(row)
    found["all"] = rows
    return [Group(name, len(part), sum(math.prod(row.shape) for row in part), sum(row.bytes for row in part),
                  sum(row.bytes_per_device for row in part)) for name, part in found.items()]


def histogram(values: np.ndarray, bins: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """(counts [bins], edges [bins + 1]) of an array's numbers. Raises: ValueError where some are not finite."""
    values = np.asarray(values, np.float64).ravel()
    if not np.isfinite(values).all():
        raise ValueError(f"values: got {int((~np.isfinite(values)).sum())} of {values.size} that are not finite, allowed: finite numbers")
    return np.histogram(values, bins=bins)


def heat_map(values: np.ndarray, limit: int = 256) -> np.ndarray:
    """An array as a picture [rows, columns] of inputs by outputs.

    Matrices are themselves; a convolution [H,W,I,O] is the root mean square over its taps; a vector is one row. Sides longer than `limit`
    are cut into that many parts, of which the mean magnitude is shown.
    """
    values = np.asarray(values, np.float64)
    if values.ndim < 2:
        values = values.reshape(1, -1)
    elif values.ndim > 2:
        values = np.sqrt(np.mean(np.square(values), axis=tuple(range(values.ndim - 2))))
    if max(values.shape) <= limit:
        return values
    values = np.abs(values)
    for axis in (0, 1):
        parts = np.array_split(values, min(limit, values.shape[axis]), axis=axis)
        values = np.stack([part.mean(axis=axis) for part in parts], axis=axis)
    return values


def largest_difference(workdir: str | pathlib.Path, other: str | pathlib.Path, *, step: int | None = None,
                       pattern: str = "/(params|ema)/") -> tuple[float, str]:
    """(|a - b| / |b|, name) of the array in which two runs differ most at a step (default: the newest of the second).

    Raises: ValueError where they do not hold the same arrays.
    """
    step, rows = table(other, pattern, step=step)
    _, mine = table(workdir, pattern, step=step)
    if [row[:3] for row in mine] != [row[:3] for row in rows]:
        raise ValueError(f"workdir: {workdir} holds other arrays than {other}")
    worst = (0.0, rows[0].name)
    for piece in _pieces(rows, 2):
        names = [row.name for row in piece]
        for name, a, b in zip(names, read(workdir, names, step=step), read(other, names, step=step)):
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            worst = max(worst, (float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)), name))
    return worst


def as_text(rows: Sequence[NamedTuple], columns: Sequence[str] | None = None) -> str:
    """Rows as an aligned table; numbers with 4 digits, bytes with their unit."""
    if not rows:
        return ""
    columns = list(columns or rows[0]._fields)
    cells = [[_cell(column, getattr(row, column)) for column in columns] for row in rows]
    averages = [c for c in columns if isinstance(getattr(rows[0], c), Mapping)]
    titles = [c.replace("_", " ") + (f" ({', '.join(getattr(rows[0], c))})" if c in averages else "") for c in columns]
    widths = [max(len(line[i]) for line in [titles, *cells]) for i in range(len(columns))]
    left = [isinstance(getattr(rows[0], c), str | tuple) for c in columns]
    lines = [[text.ljust(w) if to_left else text.rjust(w) for text, w, to_left in zip(line, widths, left)] for line in [titles, *cells]]
    return "\n".join("  ".join(line).rstrip() for line in [lines[0], ["-" * w for w in widths], *lines[1:]])


def _cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    if column.startswith("bytes"):
        for unit in ("B", "KiB", "MiB", "GiB"):
            if value < 1024 or unit == "GiB":
                return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
            value /= 1024
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{v:.2e}" for v in value.values())
    return "x".join(map(str, value)) if isinstance(value, tuple) else f"{value:,}" if isinstance(value, int) else str(value)
