"""Runs in processes of their own, which say what they are doing, for tests that end them at a chosen moment.

    python stoppable.py ARGUMENTS OF sim_jax.main

prints "saving STEP", "sealing STEP", "complete STEP", "measuring STEP" and "restoring" as they begin (or are done).
"""

from __future__ import annotations

import json
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time

import runs

MOMENTS = ("start", "restoring", "stepping", "saving", "sealing", "complete", "measuring")
# Every generator of randomness is in use; a checkpoint every 5 iterations, an evaluation every 10, the best and every 100th kept.
OVERRIDES = ("--config.generator.dropout=0.1", "--config.fake_score.dropout=0.1",
             "--config.run.save_every=5", "--config.run.eval_every=10", "--config.run.sample_every=40", "--config.run.probe_every=40",
             "--config.run.keep_every=100", "--config.run.features=digits", "--config.run.metrics=('fd',)", "--config.run.eval_images=100",
             "--config.run.panel_images=0", "--config.teacher.path=random:3")


def _say(line: str) -> None:
    os.write(1, f"{line}\n".encode())  # in one piece, also where two threads talk


def _announce(function, word, step=lambda *args: args[1]):
    """`function`, a method, after a line that says so."""
    def announced(*args, **kwargs):
        _say(f"{word} {step(*args)}")
        return function(*args, **kwargs)

    return announced


def main() -> int:
    """The process itself."""
    import pytest

    from sim_jax import checkpoint, showcase
    from sim_jax import main as entry

    runs.use_pixel_networks(pytest.MonkeyPatch())
    saver = checkpoint.Checkpoints
    finish = saver._finish

    def finished(self):
        finish(self)
        _say(f"complete {self.latest()}")

    saver._finish = finished
    saver.save = _announce(saver.save, "saving")
    saver._seal = _announce(saver._seal, "sealing", lambda self: self._saving)
    saver.restore_newest = _announce(saver.restore_newest, "restoring", lambda *args: "")
    showcase.Showcase.measure = _announce(showcase.Showcase.measure, "measuring")
    return entry.main()


class Process:
    """One life of a run."""

    def __init__(self, workdir, *overrides: str, steps: int, devices: int = 4):
        command = runs.command("digits.py", workdir, *OVERRIDES, f"--config.total_kimg={steps * 16 / 1000}", *overrides)
        env = {**os.environ, "PYTHONPATH": f"{runs.ROOT}:{runs.ROOT / 'tests'}", "XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": str(devices),
               "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        self.words: queue.Queue[str | None] = queue.Queue()
        self.completed = 0
        self.process = subprocess.Popen([sys.executable, __file__, *command[1:]], cwd=runs.ROOT, env=env, text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.error: list[str] = []
        for work in (self._listen, lambda: self.error.extend(self.process.stderr)):
            threading.Thread(target=work, daemon=True).start()

    def _listen(self) -> None:
        for line in self.process.stdout:
            word, _, step = line.strip().partition(" ")
            if word == "complete":
                self.completed = max(self.completed, int(step))
            self.words.put(word)
        self.words.put(None)

    def wait_for(self, moment: str, number: int, timeout: float = 600) -> bool:
        """Until `moment` has come `number` times; False if the process ends before."""
        deadline = time.monotonic() + timeout
        while number > 0:
            word = self.words.get(timeout=max(deadline - time.monotonic(), 0.1))
            if word is None:
                return False
            number -= word == moment
        return True

    def end(self, timeout: float = 600) -> tuple[int, str]:
        """(exit code, standard error), once it has ended."""
        self.process.wait(timeout)
        while self.words.get(timeout=60) is not None:
            pass
        return self.process.returncode, "".join(self.error)


def kill_at(process: Process, moment: str, number: int, draw: random.Random) -> tuple[int, str]:
    """Sends signal `number` at (or some milliseconds after) a `moment`; returns as `end`."""
    if moment == "start":
        time.sleep(draw.uniform(0.05, 6.0))
    elif moment == "stepping":
        process.wait_for("complete", draw.randint(1, 3))
        time.sleep(draw.uniform(0, 0.3))
    elif moment == "restoring":
        process.wait_for("restoring", 1)
        time.sleep(draw.uniform(0, 0.5))
    else:
        process.wait_for(moment, draw.randint(1, 2))
        time.sleep(draw.choice([0.0, draw.uniform(0, 0.02), draw.uniform(0, 0.1)]))
    if process.process.poll() is None:
        process.process.send_signal(number)
    return process.end()


def complete(workdir) -> list[int]:
    """The steps there with a manifest, by looking."""
    folder = workdir / "checkpoints"
    return sorted(int(p.parent.name) for p in folder.glob("*/MANIFEST.json") if p.parent.name.isdigit()) if folder.is_dir() else []


def kill_often(workdir, *, steps: int, plan: list[tuple[int, str]], seed: int, overrides: tuple[str, ...] = ()) -> dict:
    """Ends a run once for every (signal, moment) of `plan`, and starts it again each time; then lets it end. Returns what happened."""
    draw, tally, lost, last = random.Random(seed), {}, [], 0
    for number, moment in plan:
        life = Process(workdir, *overrides, steps=steps)
        code, error = kill_at(life, moment, number, draw)
        ended = code == 0
        there = complete(workdir)
        newest = max(there, default=0)
        # Nothing older than the last save that said it was complete is lost; and the run went on from where it had been.
        assert newest >= max(life.completed, last), (newest, life.completed, last, error)
        assert last == 0 or f"resuming at step {last} of" in error or not life.completed, error
        assert "Traceback" not in error and "damaged" not in error, error
        if number == signal.SIGKILL:
            assert code in (-9, 0), (code, error)
        else:  # before the handlers are there, it just dies
            assert code in (143, -15, 0), (code, error)
            if code == 143 and "saved step" in error:
                assert f"saved step {newest} of {steps}" in error, error
        lost.append(newest - last if code == -9 else 0)
        key = f"{signal.Signals(number).name} {moment}"
        tally[key] = tally.get(key, 0) + (not ended)
        last = newest
        print(json.dumps({"signal": signal.Signals(number).name, "moment": moment, "code": code, "newest": newest}), flush=True)
        if ended:
            break
    code, error = Process(workdir, *overrides, steps=steps).end()
    assert code == 0, error
    assert not list((workdir / "checkpoints").glob("*tmp*")) and not list((workdir / "checkpoints").glob("*.deleting"))
    return tally


if __name__ == "__main__":
    sys.exit(main())
