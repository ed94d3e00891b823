"""Signals are remembered, not died of; several processes stop after the same iteration."""

from __future__ import annotations

import signal

import jax
import pytest
from jax.experimental import multihost_utils

from sim_jax.interrupts import EXIT_CODES, Abandoned, Interrupts

TERM, INT = signal.SIGTERM, signal.SIGINT


@pytest.mark.parametrize("number, code", [(TERM, 143), (INT, 130)])
def test_the_first_signal_is_remembered_and_the_second_kills(number, code):
    before = signal.getsignal(number)
    with Interrupts() as signals:
        assert signals.stop(1) is None
        signal.raise_signal(number)
        assert signals.stop(2) == number and EXIT_CODES[number] == code
        assert signal.getsignal(number) == before
    assert signal.getsignal(number) == before


def test_work_that_is_done_again_later_is_abandoned():
    with Interrupts() as signals:
        with pytest.raises(Abandoned), signals.abandonable():
            signal.raise_signal(TERM)
            raise AssertionError("went on")
        assert signals.stop(1) == TERM
        with pytest.raises(Abandoned), signals.abandonable():      # not even begun
            raise AssertionError("begun")
    with Interrupts() as signals:
        with signals.abandonable():
            pass
        signal.raise_signal(TERM)                                  # outside it only counts
        assert signals.received == TERM


def test_when_all_is_saved_a_signal_ends_the_run_at_once(capsys):
    with pytest.raises(SystemExit) as stop, Interrupts() as signals:
        signals.all_is_saved = True
        signal.raise_signal(TERM)
    assert stop.value.code == 143 and "SIGTERM: everything is saved" in capsys.readouterr().err


def test_several_processes_stop_where_the_preemption_service_says(monkeypatch):
    """SIGTERM stays with the service, which is also what is told of a SIGINT; nothing is abandoned by one process alone."""
    heard = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda step: step == 7)
    before = signal.signal(TERM, lambda number, frame: heard.append(number))
    try:
        with Interrupts() as signals, signals.abandonable():
            signal.raise_signal(TERM)
            assert heard == [TERM] and signals.received is None
            assert [signals.stop(step) for step in (6, 7)] == [None, TERM]
            signal.raise_signal(INT)
            assert heard == [TERM, TERM] and [signals.stop(step) for step in (6, 7)] == [None, INT]
    finally:
        signal.signal(TERM, before)
