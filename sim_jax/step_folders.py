"""The `checkpoints/` folder of a workdir, as a folder: which steps are there, which stay, what is put aside.

    120/                          a complete checkpoint (its MANIFEST.json says what it must hold)
    120.orbax-checkpoint-tmp/     one that is being written, or was when the process died
    120.deleting/                 one that is being removed
    120.damaged/                  one that did not pass verification: kept for whoever wants to look, never read again
    figures.json                  what was measured at which step
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from sim_jax import files

FIGURES = "figures.json"
TEMPORARY = ".orbax-checkpoint-tmp"
_DELETING, _DAMAGED = ".deleting", ".damaged"


def steps(folder: str | Path) -> list[int]:
    """The steps with their final names, ascending."""
    folder = Path(folder)
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal() and p.is_dir()) if folder.is_dir() else []


def clean(folder: Path) -> None:
    """Removes what a process that died was writing or removing. Only for the one process that writes here."""
    for path in folder.iterdir():
        if TEMPORARY in path.name or path.name.endswith(_DELETING):
            shutil.rmtree(path, ignore_errors=True)


def remove(folder: Path, step: int) -> None:
    """Renamed first: a half-removed step must not look like a step."""
    doomed = folder / f"{step}{_DELETING}"
    (folder / str(step)).rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def set_aside(folder: Path, step: int) -> Path:
    """Renames a damaged step, so that training can save it again."""
    number, aside = 1, folder / f"{step}{_DAMAGED}"
    while aside.exists():
        number += 1
        aside = folder / f"{step}{_DAMAGED}.{number}"
    (folder / str(step)).rename(aside)
    return aside


def superfluous(there: Collection[int], *, keep: int, keep_every: int = 0, best: int | None = None) -> list[int]:
    """The steps to remove.

    Args:
      there: all steps.
      keep: that many of the newest stay.
      keep_every: multiples of it stay for ever; 0: none.
      best: stays.
    """
    newest = sorted(there)[-keep:]
    return sorted(s for s in there if not (s in newest or s == best or (keep_every and s % keep_every == 0)))


def read_figures(folder: Path) -> dict[int, dict[str, float]]:
    """What was measured at which step; nothing from a file that cannot be read, since it only says what may be removed."""
    try:
        return {int(step): dict(figures) for step, figures in json.loads((folder / FIGURES).read_bytes()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def record_figures(folder: Path, step: int, figures: Mapping[str, float]) -> None:
    """Adds a step's figures; those of later steps, which a run repeats, go."""
    kept = {s: f for s, f in read_figures(folder).items() if s < step}
    text = json.dumps({str(s): f for s, f in {**kept, step: dict(figures)}.items()}).encode() + b"\n"
    files.write_atomically(folder / FIGURES, lambda file: file.write(text), key="workdir")


def best_step(folder: Path, figure: str) -> int | None:
    """The step there with the lowest `figure`, of any average ("fd" finds "fd/generator" and "fd/generator_ema_1k")."""
    there, lowest = set(steps(folder)), {}
    for step, figures in read_figures(folder).items():
        values = [value for name, value in figures.items() if figure and name.startswith(f"{figure}/") and value == value]
        if values and step in there:
            lowest[step] = min(values)
    return min(lowest, key=lambda step: (lowest[step], step)) if lowest else None
