"""Tables between two code bases' names of the same parameters, in PyTorch's layout, and what lies beside a file of diffusers."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

_LARGEST_CONFIG = 1 << 20


class Row(NamedTuple):
    """One parameter.

    Attributes:
      ours: its name here.
      theirs: its name there, or the names of its equal parts along the first axis.
      copies: `theirs` are not parts but copies of it, which must be the same.
    """

    ours: str
    theirs: tuple[str, ...]
    copies: bool = False


def layers(table: Mapping[str, str | Sequence[str]], ours: str = "", theirs: str = "") -> list[Row]:
    """Rows of layers with weight and bias, from {name: name or names of parts}, behind prefixes."""
    rows = []
    for name, parts in table.items():
        names = (parts,) if isinstance(parts, str) else parts
        rows += [Row(f"{ours}{name}.{kind}", tuple(f"{theirs}{part}.{kind}" for part in names)) for kind in ("weight", "bias")]
    return rows


def to_ours(state: Mapping[str, np.ndarray], rows: Iterable[Row]) -> dict[str, np.ndarray]:
    """The state under our names; raises ValueError for names that are missing or unused, parts that differ in shape, copies that differ."""
    rows = list(rows)
    wanted = {name for row in rows for name in row.theirs}
    problems = [f"{what}: {', '.join(sorted(names)[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}"
                for what, names in (("missing", wanted - state.keys()), ("unused", state.keys() - wanted)) if names]
    if problems:
        raise ValueError(f"does not fit the network: {'; '.join(problems)}")
    out = {}
    for row in rows:
        parts = [state[name] for name in row.theirs]
        for name, part in zip(row.theirs[1:], parts[1:], strict=True):
            if part.shape != parts[0].shape or part.dtype != parts[0].dtype:
                raise ValueError(f"{name} is {part.dtype} {part.shape}, but {row.theirs[0]} is {parts[0].dtype} {parts[0].shape}")
            if row.copies and not np.array_equal(part, parts[0]):
                raise ValueError(f"{name} differs from {row.theirs[0]}, which is the same layer in the original network")
        out[row.ours] = parts[0] if row.copies or len(parts) == 1 else np.concatenate(parts)
    return out


def to_theirs(state: Mapping[str, np.ndarray], rows: Iterable[Row]) -> dict[str, np.ndarray]:
    """The inverse of `to_ours`, as views. Raises: ValueError for a name that the rows do not have, or that the state does not."""
    rows = list(rows)
    if {row.ours for row in rows} != state.keys():
        raise ValueError(f"no names there for: {', '.join(sorted({row.ours for row in rows} ^ state.keys())[:8])}")
    out = {}
    for row in rows:
        parts = [state[row.ours]] * len(row.theirs) if row.copies else np.split(state[row.ours], len(row.theirs))
        out.update(zip(row.theirs, parts, strict=True))
    return out


def config_beside(path: str, class_names: Sequence[str]) -> dict[str, Any]:
    """The config.json that diffusers keeps beside a file of weights; {} where there is none of these classes."""
    file = pathlib.Path(path).with_name("config.json")
    try:
        if not file.is_file() or file.stat().st_size > _LARGEST_CONFIG:
            return {}
        config = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) and config.get("_class_name") in class_names else {}
