"""Checkpoints of the training state: asynchronous, atomic and sharded by orbax, restored onto any number of devices."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

_ITEMS = ("state", "meta")


class Checkpoints:
    """The `checkpoints/` folder of a workdir. Saves return at once; `close` waits for what is under way.

    Args:
      folder: made if absent.
      keep: how many of the newest steps stay.
    """

    def __init__(self, folder: str | pathlib.Path, *, keep: int = 3):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(pathlib.Path(folder).absolute(), options=options, item_names=_ITEMS)

    def latest(self) -> int | None:
        """The newest complete step."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        """Starts saving; `state` may be donated right after. `meta` is JSON: seconds spent, and the like."""
        latest = self._manager.latest_step()
        if latest == step:
            return
        # Behind a newer step, orbax either saves nothing and says so by a return value alone, or counts the wrong step as newest.
        if latest is not None and step < latest or not self._manager.save(step, args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(dict(meta))), force=True):
            raise RuntimeError(f"checkpoint {step} was not saved: step {latest} is the newest in {self._manager.directory}")

    def restore(self, step: int, shapes: Any, shardings: Any) -> tuple[Any, dict[str, Any]]:
        """Reads `step` straight onto its devices.

        Args:
          shapes: tree of ShapeDtypeStructs, as from `jax.eval_shape`.
          shardings: the same tree of NamedShardings; the number of devices may differ from the one that saved.
        Returns: (state, meta).
        Raises: ValueError if the files cannot be read, or hold another architecture.
        """
        target = jax.tree.map(lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes, shardings)
        try:
            out = self._manager.restore(step, args=ocp.args.Composite(
                state=ocp.args.StandardRestore(target), meta=ocp.args.JsonRestore()))
        except Exception as error:  # orbax raises many types for damaged files
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"checkpoint {self._manager.directory / str(step)}: cannot be restored ({type(error).__name__}: {reason}); "
                             f"steps there: {list(self._manager.all_steps())}; delete the damaged folder to resume from an older one"
                             ) from error
        return out.state, dict(out.meta)

    def wait(self) -> None:
        """Until everything started is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()


def latest_step(folder: str | pathlib.Path) -> int | None:
    """The newest complete step in a `checkpoints/` folder, found by the names alone."""
    folder = pathlib.Path(folder)
    return max((int(p.name) for p in folder.iterdir() if p.name.isdigit()), default=None) if folder.is_dir() else None


def read_tree(folder: str | pathlib.Path, path: tuple[str, ...], shapes: Any) -> tuple[int, Any]:
    """One subtree of the newest checkpoint, for sampling: e.g. path ("generator", "ema", "ema_500k").

    Args:
      folder: the `checkpoints/` folder.
      path: where the subtree lies in the saved state.
      shapes: its ShapeDtypeStructs.
    Returns: (step, tree of arrays on the first device).
    Raises: ValueError if there is no checkpoint, or it lacks the subtree.
    """
    folder = pathlib.Path(folder).absolute()
    step = latest_step(folder)
    if step is None:
        raise ValueError(f"{folder}: no checkpoint there")
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    item = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=one), shapes)
    for name in reversed(path):
        item = {name: item}
    args = ocp.args.PyTreeRestore(item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            tree = reader.restore(folder / str(step) / "state", args=args)
    except Exception as error:  # orbax raises many types for damaged or foreign files
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"checkpoint {folder / str(step)}: cannot read {'/'.join(path)} ({type(error).__name__}: {reason})") from error
    for name in path:
        tree = tree[name]
    if not all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(tree)):  # orbax leaves what is absent as it was asked for
        raise ValueError(f"checkpoint {folder / str(step)}: cannot read {'/'.join(path)} (it holds no such arrays)")
    return step, tree


def read_json(path: str | pathlib.Path) -> Any:
    """Raises ValueError for a file that is missing or no JSON."""
    try:
        return json.loads(pathlib.Path(path).read_text())
    except OSError:
        raise ValueError(f"{path}: missing or unreadable") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
