"""What a run tells while it runs: metrics.jsonl, TensorBoard events, statistics of samples.

metrics.jsonl has one object a line, `{"step": 40, "kimg": 2.56, "generator/loss": 0.81, ...}`: `step` an
integer, all else numbers; a figure that is not finite is `null`, because JSON knows no NaN (`read_metrics`
gives it back as NaN). Nothing here imports JAX: an array is anything that numpy can read.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sim_jax import files

FILE_NAME = "metrics.jsonl"
BOARD_NAME = "tensorboard"
_RESERVED = ("step", "kimg")


def _parse(line: bytes) -> dict[str, Any] | None:
    """The row that a line holds, or None for a line that a kill has cut."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl (or of the one in a workdir), in order, `null` as NaN.

    Works on the file of a running job: a half-written last line is left out. No file, no rows.
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    if not path.exists():
        return []
    rows = [_parse(line) for line in path.read_bytes().split(b"\n") if line.strip()]
    return [{key: math.nan if value is None else value for key, value in row.items()} for row in rows if row]


def truncate_metrics(path: str | Path, step: int) -> None:
    """Makes a metrics.jsonl what it was when `step` was saved, atomically.

    Drops what is later than `step` (everything for step 0, at which nothing was saved) and lines that a kill
    has cut. A file that needs no change is not touched.
    """
    path = Path(path)
    if not path.exists():
        return
    old = path.read_bytes()
    kept = []
    for line in filter(bytes.strip, old.split(b"\n")):
        row = _parse(line)
        if row is None:
            logging.warning("%s: dropped a line that is not whole: %r", path, line[:80])
        elif 0 < step and row["step"] <= step:
            kept.append(line + b"\n")
    new = b"".join(kept)
    if new != old:
        files.write_atomically(path, lambda file: file.write(new), key="workdir")


class MetricWriter:
    """Writes metrics.jsonl and TensorBoard events (in `workdir/tensorboard`) without making the device wait.

    `write` only starts the copy to the host; the figures are converted and written when the next step's
    arrive, by which time they are there, or on `flush` and `close`. So at most one step's figures are lost by
    a kill. Call `flush` before a checkpoint is saved: a resume then finds every line up to the checkpoint,
    and repeats the later ones. Figures written for the step that is still waiting join its line.

    Attributes:
      latest: the figures converted last, by name (floats; all names seen so far), for a progress bar.
    """

    def __init__(self, workdir: str | Path, *, start_step: int = 0, enabled: bool = True,
                 tensorboard: bool = True):
        """Opens the files.

        Args:
          workdir: made where missing.
          start_step: the step that was restored, 0 for a fresh start; later lines (for 0: all) are dropped,
            and TensorBoard is told to forget them.
          enabled: False makes everything a no-op: for all processes but the first.
          tensorboard: False leaves the events out.

        Raises: ValueError where workdir cannot be written.
        """
        self.latest: dict[str, float] = {}
        self._pending: tuple[int, float, dict[str, Any]] | None = None
        self._file = self._board = None
        if not enabled:
            return
        workdir = files.make_folder(workdir)
        path = workdir / FILE_NAME
        truncate_metrics(path, start_step)
        try:
            self._file = open(path, "ab", buffering=0)  # nothing is left over for a file object to lose, or to complain about
        except OSError as error:
            raise ValueError(f"workdir: got {str(workdir)!r}, allowed: a folder that can be written "
                             f"({error.strerror})") from error
        if tensorboard:
            from tensorboardX import SummaryWriter  # here, because it takes a while to import
            first = start_step + 1 if start_step else 0
            self._board = SummaryWriter(str(workdir / BOARD_NAME), purge_step=first,
                                        filename_suffix=f".from{start_step}")

    def write(self, step: int, kimg: float, metrics: Mapping[str, Any]) -> None:
        """Takes a step's figures: numbers, or arrays of one element on any device. Does not wait for them.

        Raises: ValueError for a name that is taken (step, kimg) or a value of more than one element.
        """
        if self._file is None:
            return
        for name, value in metrics.items():
            if name in _RESERVED:
                raise ValueError(f"metrics: got the name {name!r}, allowed: any but {', '.join(_RESERVED)}")
            if np.size(value) != 1:
                raise ValueError(f"metrics: got {name!r} of shape {list(np.shape(value))}, "
                                 "allowed: single numbers")
            if hasattr(value, "copy_to_host_async"):
                value.copy_to_host_async()
        if self._pending is not None and self._pending[0] == step:
            self._pending[2].update(metrics)
            return
        self._convert()
        self._pending = (int(step), float(kimg), dict(metrics))

    def _convert(self) -> None:
        if self._pending is None:
            return
        (step, kimg, metrics), self._pending = self._pending, None
        figures = {name: float(np.asarray(value).reshape(())) for name, value in metrics.items()}
        row = {"step": step, "kimg": kimg} | figures
        row = {name: value if math.isfinite(value) else None for name, value in row.items()}
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        while line:
            line = line[self._file.write(line):]  # a nearly full disk takes a part, and raises for the rest
        self.latest |= figures
        if self._board_works():
            for name, value in figures.items():
                if math.isfinite(value):
                    self._board.add_scalar(name, value, global_step=step)

    def write_image(self, step: int, name: str, picture: np.ndarray) -> None:
        """Puts a picture, uint8 [H, W, C] (such as a grid of samples), among TensorBoard's images."""
        if self._board_works():
            self._board.add_image(name, np.asarray(picture), global_step=step, dataformats="HWC")

    def write_histogram(self, step: int, name: str, values: np.ndarray) -> None:
        """Puts a distribution among TensorBoard's histograms."""
        if self._board_works():
            self._board.add_histogram(name, np.asarray(values, np.float64), global_step=step)

    def flush(self) -> None:
        """Waits for the figures that are still on the device and writes them."""
        if self._file is None:
            return
        self._convert()
        if self._board_works():
            self._board.flush()

    def _board_works(self) -> bool:
        """TensorBoard's events are written by a thread, which a full disk ends; what it is given then waits for ever, so it gets no more."""
        if self._board is None:
            return False
        events = self._board.file_writer.event_writer
        if events._worker is None or events._worker.is_alive():
            return True
        events._event_queue.cancel_join_thread()
        logging.warning("TensorBoard's events end here: their writer has stopped")
        self._board = None
        return False

    def close(self) -> None:
        """Flushes and closes; later calls are no-ops."""
        try:
            self.flush()
            if self._board_works():
                self._board.close()
        finally:
            if self._file is not None:
                self._file.close()
            self._file = self._board = None

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def image_statistics(images: np.ndarray, reference: np.ndarray | None = None) -> dict[str, float]:
    """Brightness, contrast and diversity of samples, beside those of a reference (teacher or data).

    With pixels x in [-1, 1]: `samples/mean` = mean x; `samples/std` = mean over images of the standard
    deviation within an image; `samples/diversity` = root mean square over pixels of the standard deviation
    across images (0: all samples are alike). With a reference the same under `..._reference`, which the
    report draws as the level to stay at.

    Args:
      images, reference: uint8 or float (in [-1, 1]) [N, H, W, C]; the two N may differ.
    """
    def of(x: np.ndarray) -> tuple[float, float, float]:
        x = np.asarray(x)
        x = x.astype(np.float64) / 127.5 - 1 if x.dtype == np.uint8 else x.astype(np.float64)
        return float(x.mean()), float(x.std(axis=(1, 2, 3)).mean()), float(np.sqrt(x.var(axis=0).mean()))

    names = ("samples/mean", "samples/std", "samples/diversity")
    out = dict(zip(names, of(images), strict=True))
    if reference is not None:
        out |= dict(zip((f"{name}_reference" for name in names), of(reference), strict=True))
    return out
