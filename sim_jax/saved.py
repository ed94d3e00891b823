"""Reading what a checkpoint holds: whether it is whole, how it differs from what is trained, one tree out of it."""

from __future__ import annotations

import json
import logging
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from sim_jax import manifest, step_folders

Note = Callable[[str], None]
META = pathlib.Path("meta") / "metadata"  # where orbax keeps the JSON item
_SHOWN = 6  # differences in a message


def print_note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Unreadable(ValueError):
    """Files that orbax cannot read."""


def latest_step(folder: str | pathlib.Path) -> int | None:
    """The newest complete step in a `checkpoints/` folder, found by the names alone."""
    return max(step_folders.steps(folder), default=None)


def newest_good(folder: pathlib.Path, refused: dict[int, str]) -> int | None:
    """The newest step that passes verification, else the newest without a manifest that is not in `refused`.

    Args:
      refused: steps not to look at, with reasons; this adds those that it refuses.
    """
    unsealed = []
    for step in reversed(step_folders.steps(folder)):
        if step in refused:
            continue
        why = manifest.verify(folder / str(step))
        if why is None:
            refused.update({s: manifest.MISSING for s in unsealed})
            return step
        if why == manifest.MISSING:
            unsealed.append(step)
        elif (folder / str(step)).is_dir():  # else a run that is going on has just removed it
            refused[step] = why
    return unsealed[0] if unsealed else None


def differences(folder: pathlib.Path, shapes: Any) -> list[str]:
    """How the state in a step's folder differs from `shapes`: absent, additional, or other arrays; orbax's errors for damaged files."""
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
        described = reader.metadata(folder / "state").item_metadata
    if described is None:
        raise Unreadable(f"checkpoint {folder}: its own description of the state cannot be read")
    saved = _named(dict(described.tree))
    wanted = _named(shapes)
    out = []
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            out.append(f"{name}: {saved.get(name, 'nothing')} is saved, {wanted.get(name, 'nothing')} is trained")
    return out


def _named(tree: Any) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}" for path, leaf in leaves}


def read_tree(folder: str | pathlib.Path, path: tuple[str, ...], shapes: Any, *, note: Note | None = None) -> tuple[int, Any]:
    """One subtree of the newest good checkpoint, for sampling: e.g. path ("generator", "ema", "ema_500k"). Changes nothing there.

    Args:
      folder: the `checkpoints/` folder.
      path: where the subtree lies in the saved state.
      shapes: its ShapeDtypeStructs.
      note: prints a line; standard error if absent.
    Returns: (step, tree of arrays on the first device).
    Raises: ValueError if there is no good checkpoint, or it lacks the subtree.
    """
    folder = pathlib.Path(folder).absolute()
    refused: dict[int, str] = {}
    while True:
        step = newest_good(folder, refused)
        if step is None:
            raise ValueError(none_good(folder, refused) if refused else f"{folder}: no checkpoint there")
        try:
            tree = _read(folder / str(step) / "state", path, shapes)
            break
        except Unreadable as error:
            if (folder / str(step) / manifest.FILE_NAME).is_file():
                raise
            refused[step] = str(error)
    for other, why in refused.items():
        if other > step:
            (note or print_note)(f"checkpoint {folder / str(other)}: damaged ({why}); using step {step}")
    for name in path:
        tree = tree[name]
    if not all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(tree)):  # orbax leaves what is absent as it was asked for
        raise ValueError(f"checkpoint {folder / str(step)}: cannot read {'/'.join(path)} (it holds no such arrays)")
    return step, tree


def _read(folder: pathlib.Path, path: tuple[str, ...], shapes: Any) -> Any:
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    item = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=one), shapes)
    for name in reversed(path):
        item = {name: item}
    args = ocp.args.PyTreeRestore(item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            return reader.restore(folder, args=args)
    except Exception as error:  # orbax raises many types for damaged or foreign files
        why = " ".join(str(error).split())[:300]
        raise Unreadable(f"checkpoint {folder.parent}: cannot read {'/'.join(path)} ({type(error).__name__}: {why})") from error


def read_json(path: str | pathlib.Path) -> Any:
    """Raises ValueError for a file that is missing or no JSON."""
    try:
        return json.loads(pathlib.Path(path).read_text())
    except OSError:
        raise ValueError(f"{path}: missing or unreadable") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None


def none_good(folder: pathlib.Path, refused: Mapping[int, str]) -> str:
    reasons = "; ".join(f"step {step}: {why}" for step, why in sorted(refused.items(), reverse=True))
    return f"{folder}: no checkpoint there is good ({reasons}); nothing was changed; restore one from elsewhere, or choose another --workdir"


def first(different: list[str]) -> str:
    return "; ".join(different[:_SHOWN]) + (f"; and {len(different) - _SHOWN} more" if len(different) > _SHOWN else "")


def be_quiet() -> None:
    """Keeps orbax from logging what is raised anyway, with a traceback, and files that it looks for beside ours in vain."""
    logging.getLogger("absl").addFilter(_worth_saying)


def _worth_saying(record: logging.LogRecord) -> bool:
    if "orbax" not in record.pathname:
        return True
    return not record.exc_info and not record.getMessage().startswith(("Metadata file does not exist", "Failed to get item metadata"))
