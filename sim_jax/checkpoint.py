"""Checkpoints of the training state: asynchronous, atomic and sharded by orbax, verified before they are read, restored onto any devices.

A save is complete once its folder has its final name; the manifest is inside by then (`manifest`). So a kill at any instant leaves the
last complete step and, at most, a folder with a temporary name, which the next run removes. Older steps are removed only after a newer
one is complete. A step without a manifest comes from an earlier version of this package: it is used only where no verified one is
left, with a note that orbax's reading it is all the verification there is.
"""

from __future__ import annotations

import pathlib
import threading
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from sim_jax import files, manifest, processes, saved, step_folders
from sim_jax.saved import Note, latest_step, read_json, read_tree  # noqa: F401 (the reading half, under the name that people look for)

_NOTHING, _NONE_GOOD = -1, -2


class Checkpoints:
    """The `checkpoints/` folder of a workdir. Saves return at once; `wait` and `close` wait for what is under way.

    Args:
      folder: made if absent; one run writes there at a time.
      keep: how many of the newest steps stay.
      keep_every: multiples of it stay for ever; 0: none.
      best: the step with the lowest of this figure stays; "": none.
      note: prints a line.
    """

    def __init__(self, folder: str | pathlib.Path, *, keep: int = 3, keep_every: int = 0, best: str = "", note: Note | None = None):
        self._folder = pathlib.Path(folder).absolute()
        self._knobs, self._best, self._note = {"keep": keep, "keep_every": keep_every}, best, note or saved.print_note
        self._main = jax.process_index() == 0
        if self._main:
            files.make_folder(self._folder)
            step_folders.clean(self._folder)
        processes.meet("checkpoints/opened")
        saved.be_quiet()
        options = ocp.options.AsyncOptions(post_finalization_callback=self._seal)
        self._saver = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler("state", "meta"), async_options=options)
        self._saving: int | None = None
        self._finisher: threading.Thread | None = None
        self._error: Exception | None = None

    def latest(self) -> int | None:
        """The newest complete step, by the names alone."""
        return latest_step(self._folder)

    def settled(self) -> int | None:
        """The newest complete step, once everything started is on disk."""
        self.wait()
        return self.latest()

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        """Starts saving; `state` may be donated right after. `meta` is JSON: seconds spent, and the like.

        Raises: what went wrong with the save before this one.
        """
        if self._saving == step:
            return
        self.wait()
        latest = self.latest()
        if latest == step:
            return
        if latest is not None and step < latest:
            raise RuntimeError(f"checkpoint {step} was not saved: step {latest} is the newest in {self._folder}")
        self._saving = step
        try:
            self._saver.save(self._folder / str(step), args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(dict(meta))))
        except BaseException:
            self._saving = None
            raise
        self._finisher = threading.Thread(target=self._finish, name="checkpoint")
        self._finisher.start()

    def _seal(self) -> None:
        """Called in the thread that commits, on the first process, when every process has written its part and orbax is to rename."""
        folder = next(p for p in self._folder.iterdir() if p.name.startswith(f"{self._saving}{step_folders.TEMPORARY}"))
        manifest.write(folder, self._saving)

    def _finish(self) -> None:
        """Waits for the commit, then lets older steps go."""
        try:
            self._saver.wait_until_finished()
            if self._main:
                manifest.flush_folder(self._folder)
                self.prune()
        except Exception as error:
            self._error = error

    def prune(self) -> None:
        """Removes the steps that are neither new, nor to be kept for ever, nor the best."""
        best = step_folders.best_step(self._folder, self._best)
        for step in step_folders.superfluous(step_folders.steps(self._folder), **self._knobs, best=best):
            step_folders.remove(self._folder, step)

    def measured(self, step: int) -> bool:
        """Whether figures of `step` are recorded."""
        return bool(processes.agreed(int(step in step_folders.read_figures(self._folder)) if self._main else 0))

    def record(self, step: int, figures: Mapping[str, float]) -> None:
        """Keeps the figures measured at `step`, which say which step is the best."""
        if self._main:
            step_folders.record_figures(self._folder, step, figures)

    def restore_newest(self, shapes: Any, shardings: Any, *, note: Note | None = None) -> tuple[int, Any, dict[str, Any]] | None:
        """The newest good step, straight onto its devices: (step, state, meta); None where no step is there.

        Newer steps that are damaged are renamed, once an older one has been read. Where none is good, nothing is touched.

        Args:
          shapes: tree of ShapeDtypeStructs, as from `jax.eval_shape`.
          shardings: the same tree of NamedShardings; the number of devices may differ from the one that saved.
          note: prints a line.
        Raises: ValueError if no step is good, or the newest good one holds another state.
        """
        self.wait()
        refused: dict[int, str] = {}
        while True:
            step = processes.agreed(self._choose(refused) if self._main else 0)
            if step == _NOTHING:
                return None
            if step == _NONE_GOOD:
                raise ValueError(saved.none_good(self._folder, refused))
            try:
                state, meta = self.restore(step, shapes, shardings)
                break
            except saved.Unreadable as error:
                refused[step] = str(error)
        self._set_aside({s: why for s, why in refused.items() if s > step}, step)
        return step, state, meta

    def _choose(self, refused: dict[int, str]) -> int:
        there = step_folders.steps(self._folder)
        step = saved.newest_good(self._folder, refused)
        return step if step is not None else _NONE_GOOD if there else _NOTHING

    def _set_aside(self, refused: Mapping[int, str], used: int) -> None:
        for step, why in sorted(refused.items(), reverse=True):
            if self._main:
                aside = step_folders.set_aside(self._folder, step)
                self._note(f"checkpoint {step} is damaged ({why}): put aside as {aside.name}")
        if self._main and refused:
            self._note(f"step {used} is the newest good checkpoint")
        if self._main and not (self._folder / str(used) / manifest.FILE_NAME).is_file():
            self._note(f"checkpoint {used} is of an earlier version, without a manifest: orbax could read it, its content is not verified")
        processes.meet("checkpoints/put_aside")

    def restore(self, step: int, shapes: Any, shardings: Any) -> tuple[Any, dict[str, Any]]:
        """One step, not verified: (state, meta); arguments as of `restore_newest`.

        Raises: ValueError if the files cannot be read, or hold another state.
        """
        folder = self._folder / str(step)
        target = jax.tree.map(lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes, shardings)
        try:
            different = saved.differences(folder, shapes)
            if not different:
                with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
                    state = reader.restore(folder / "state", args=ocp.args.StandardRestore(target))
                if int(state.step) != step:  # whoever resumes takes keys, data and schedules from it
                    raise saved.Unreadable(f"checkpoint {folder}: holds the state of step {int(state.step)}")
                return state, dict(read_json(folder / saved.META))
        except saved.Unreadable:
            raise
        except Exception as error:  # orbax raises many types for damaged files
            why = " ".join(str(error).split())[:300]
            raise saved.Unreadable(f"checkpoint {folder}: cannot be restored ({type(error).__name__}: {why})") from error
        raise ValueError(f"checkpoint {folder} holds another state than this config trains: {saved.first(different)}; choose another --workdir")

    def check(self) -> None:
        """Raises what went wrong with the last save, if that is known by now; waits for nothing."""
        if self._finisher is not None and not self._finisher.is_alive():
            self.wait()

    def wait(self) -> None:
        """Until everything started is on disk. Raises: what went wrong with it."""
        if self._finisher is not None:
            self._finisher.join()
            self._finisher = None
        if self._error is not None:
            error, self._error, self._saving = self._error, None, None
            raise error

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._saver.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self.close()
        except Exception as late:
            if error is None:
                raise
            self._note(f"the last save failed as well: {' '.join(str(late).split())[:200]}")
