"""SIGTERM, SIGINT and maintenance events: the run saves, says so, and ends with 143 or 130.

One process: a handler remembers the signal, the loop asks after every iteration. Several processes have to stop after the same
iteration: SIGTERM is then left to jax's preemption service, which every process asks after every iteration and which answers yes in
all of them at the same one (TPU maintenance events reach it too); SIGINT is handed to it as SIGTERM.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import Any

import jax

EXIT_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


class Abandoned(Exception):
    """A signal came inside `Interrupts.abandonable`."""


class Interrupts:
    """A context in which signals do not kill; a second one of the same kind does, as usual.

    Attributes:
      received: the first signal of this process, None before.
      all_is_saved: set by the run once nothing is left to save; a signal then ends it at once.
    """

    received: int | None = None
    all_is_saved = False
    _abandon = False

    def stop(self, step: int) -> int | None:
        """The signal for which the run has to save `step` and end, if any; called after every iteration, by every process."""
        if jax.process_count() == 1:
            return self.received
        from jax.experimental import multihost_utils  # only where there are several processes

        return (self.received or signal.SIGTERM) if multihost_utils.reached_preemption_sync_point(step) else None

    @contextlib.contextmanager
    def abandonable(self) -> Iterator[None]:
        """Work that is done again later: a signal raises Abandoned in it, so that minutes of it do not outlast the grace period.

        Not with several processes, which could not abandon it at the same place.
        """
        self._abandon = jax.process_count() == 1
        try:
            if self._abandon and self.received is not None:
                raise Abandoned
            yield
        finally:
            self._abandon = False

    def _take(self, number: int, frame: Any) -> None:
        if self.all_is_saved:
            print(f"{signal.Signals(number).name}: everything is saved; the same command finishes the report", file=sys.stderr)
            raise SystemExit(EXIT_CODES[number])
        self.received = number
        signal.signal(number, self._before[number])
        if jax.process_count() > 1:
            signal.raise_signal(signal.SIGTERM)  # the preemption service's handler tells the other processes
        elif self._abandon:
            raise Abandoned

    def __enter__(self) -> Interrupts:
        taken = EXIT_CODES if jax.process_count() == 1 else [signal.SIGINT]
        self._before = {number: signal.signal(number, self._take) for number in taken}
        return self

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
