"""How far a run is and how fast: a clock for images a second, and a progress bar with an ETA."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TextIO

_BAR = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"

class Clock:
    """Seconds since the start, seconds to the first step, and images a second outside pauses.

    The first step, with its compilation, counts for `seconds_to_first_step` only; so block on its result
    before `count`. Later steps need no blocking: over a window of many steps the host runs as fast as the
    device.
    """

    def __init__(self, *, earlier: float = 0.0, now: Callable[[], float] = time.monotonic):
        """`earlier`: seconds that earlier runs of this workdir took, added to `seconds`. `now`: for tests."""
        self._now = now
        self._start = now()
        self._earlier = earlier
        self._window = self._paused = 0.0
        self._images = 0
        self.seconds_to_first_step: float | None = None

    def count(self, images: int) -> None:
        """A step of `images` images is done (or, after the first, dispatched)."""
        if self.seconds_to_first_step is None:
            self.seconds_to_first_step = self._now() - self._start
            self._window, self._paused = self._now(), 0.0
        else:
            self._images += images

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """What happens inside (evaluation, samples, a checkpoint) does not count as training time."""
        begin = self._now()
        try:
            yield
        finally:
            self._paused += self._now() - begin

    def images_per_second(self) -> float | None:
        """Since the last call, without pauses; None where no step was counted in between."""
        now, images = self._now(), self._images
        spent = now - self._window - self._paused
        if not images:
            return None
        self._window, self._paused, self._images = now, 0.0, 0
        return images / spent if spent > 0 else None

    @property
    def seconds(self) -> float:
        """Since the start, with pauses and with `earlier`."""
        return self._earlier + self._now() - self._start


def clock_text(seconds: float | None) -> str:
    """3725 -> '1:02:05', 65 -> '1:05', None -> '?'."""
    if seconds is None or not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class ProgressBar:
    """A bar with rate, ETA and a few figures; off a terminal a line every tenth of the way or every minute.

    Rate and ETA count from the end of the first update, so that compilation does not spoil them.
    """

    def __init__(self, total: int, *, initial: int = 0, description: str = "", unit: str = "steps",
                 images_per_step: int | None = None, figures: Sequence[str] = (), enabled: bool = True,
                 stream: TextIO | None = None, every_seconds: float = 60.0,
                 now: Callable[[], float] = time.monotonic):
        """Shows the empty bar.

        Args:
          total, initial: steps of the whole run, and those done before it.
          description, unit: texts, say "digits" and "steps".
          images_per_step: where given, the rate is in images a second, else in units a second.
          figures: names of the two or three figures to show, of those that `update` gets.
          enabled: False shows nothing: for all processes but the first.
          stream: default standard error.
          every_seconds: longest silence off a terminal.
        """
        self._total, self._initial, self._done = total, initial, initial
        self._description, self._unit, self._per_step = description, unit, images_per_step
        self._figures, self._every, self._now = tuple(figures), every_seconds, now
        self._stream = sys.stderr if stream is None else stream
        self._enabled, self._bar = enabled, None
        self._start = self._shown = now()
        self._first: tuple[float, int] | None = None
        if enabled and self._stream.isatty():
            from tqdm import tqdm
            self._bar = tqdm(total=total, initial=initial, desc=description or None, file=self._stream,
                             dynamic_ncols=True, bar_format=_BAR)

    def _state(self) -> list[str]:
        """Rate, ETA as texts; nothing before there are two updates."""
        if self._first is None or self._done <= self._first[1]:
            return []
        rate = (self._done - self._first[1]) / max(self._now() - self._first[0], 1e-9)
        shown, unit = (rate, self._unit) if self._per_step is None else (rate * self._per_step, "images")
        return [f"{shown:.4g} {unit}/s", f"ETA {clock_text((self._total - self._done) / rate)}"]

    def update(self, step: int, figures: Mapping[str, float] | None = None) -> None:
        """Moves to `step` of `total`; `figures` are host numbers (such as MetricWriter.latest)."""
        if not self._enabled:
            return
        before, self._done, now = self._done, step, self._now()
        first = self._first is None
        if first:
            self._first = (now, step)
        shown = [f"{name} {figures[name]:.4g}" for name in self._figures if figures and name in figures]
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(self._state() + shown), refresh=False)
            self._bar.update(step - before)
            return
        tenth = before * 10 // max(self._total, 1) < step * 10 // max(self._total, 1)
        if first or tenth or step >= self._total > before or now - self._shown >= self._every:
            self._shown = now
            percent = 100 * step // max(self._total, 1)
            parts = [f"{step}/{self._total} {self._unit} ({percent}%)",
                     f"{clock_text(now - self._start)} elapsed"]
            self.note(" | ".join(parts + self._state() + shown))

    def note(self, text: str) -> None:
        """Prints a line without breaking the bar."""
        if not self._enabled:
            return
        text = f"{self._description}: {text}" if self._description else text
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
