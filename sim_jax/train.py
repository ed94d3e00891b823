"""One run from top to bottom: check -> mesh -> data -> networks -> states -> restore -> loop -> report."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import itertools
import pathlib
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from sim_jax import (
    checkpoint,
    compiling,
    dispatch,
    distributed,
    health,
    init_from,
    interrupts,
    pairs,
    probes,
    processes,
    sharding,
    showcase,
    storage,
    workdirs,
)
from sim_jax import experiment as experiments
from sim_jax.data import images as image_data
from sim_jax.data import pipeline
from sim_jax.experiment import Experiment
from sim_jax.init_from import Init
from sim_jax.metrics import MetricWriter
from sim_jax.progress import Clock, ProgressBar
from sim_jax.state import DistillState
from sim_jax.types import Params
from sim_jax.workdirs import device_name

_FIGURES = ("generator/loss", "fake_score/loss", "discriminator/loss", "denoiser/loss", "fd/generator")  # in the progress bar


def run(config: ConfigDict, workdir: str | pathlib.Path, *, command: str = "", overrides: Sequence[str] = (), init: Init | None = None,
        accept_changes: bool = False) -> int:
    """Trains until `total_kimg`, resuming from whatever the workdir holds.

    Args:
      config: as from configs/common.py.
      workdir: checkpoints, figures, pictures and the report go here.
      command, overrides: recorded in config.json and the report.
      init: other weights for a fresh run's networks to start from.
      accept_changes: a workdir of another config goes on with this one, where its state fits.
    Returns: the exit code: 0 when done (at once, if the workdir's run is), 143 or 130 after SIGTERM or SIGINT (with the state saved).
    Raises: ValueError for bad input, before anything is compiled; FloatingPointError if training diverges; StorageError for a full disk.
    """
    clock = Clock()
    compiling.use_precision(config.precision)

    # Check everything, then claim the workdir.
    workdir, main_process = pathlib.Path(workdir), distributed.is_first()
    newest = functools.partial(checkpoint.latest_step, workdir / "checkpoints")
    fresh = processes.agreed(int(newest() is None))

    def check() -> tuple[Experiment, init_from.Found | None]:
        experiment = experiments.build(config)
        if experiment.source is not None:
            image_data.validate(experiment.source)
        health.check_finite(experiment.teacher and experiment.teacher.params, "teacher.path")
        return experiment, init_from.find(init, experiment) if init is not None and fresh else None

    experiment, start = distributed.together(check)
    with storage.explained(workdir, newest):
        workdir = distributed.together(lambda: workdirs.claim(
            workdir, experiment, command=command, overrides=overrides, accept_changes=accept_changes, write=main_process,
            init=init and {**init.plain(), "origin": start and dict(start.origin)}))
    distributed.check_shared(workdir)
    distributed.connect(experiment.layout.mesh)
    bar = ProgressBar(experiment.total_steps, description=workdir.name, images_per_step=config.batch_size, enabled=main_process,
                      figures=_FIGURES)
    if init is not None:
        bar.note(start.note if start else "--init_from is ignored: the run goes on from its own checkpoint")
    knobs = dict(keep=config.run.keep, keep_every=config.run.keep_every, best=config.run.best, note=bar.note)

    with (storage.explained(workdir, newest), workdirs.locked(workdir, wanted=main_process),
          checkpoint.Checkpoints(workdir / "checkpoints", **knobs) as checkpoints, interrupts.Interrupts() as signals):
        first = processes.agreed(checkpoints.latest() or 0)
        if first == experiment.total_steps and processes.agreed(int(workdirs.reported_steps(workdir) == first)):
            bar.note(f"step {first} of {first}: nothing is left to do; to measure again delete {workdir / 'report.json'}")
            return 0
        clock, code = _Run(experiment=experiment, workdir=workdir, checkpoints=checkpoints, signals=signals, bar=bar, start=start,
                           command=command).to_the_end(clock)
        if code:
            return code
    if main_process:
        print(f"done in {clock.seconds:.0f} s: {workdir / 'report.html'}", flush=True)
    return 0


@dataclasses.dataclass(kw_only=True, eq=False)
class _Run:
    """A run, in as many attempts as it takes: one, unless training diverges and rolls back."""

    experiment: Experiment
    workdir: pathlib.Path
    checkpoints: checkpoint.Checkpoints
    signals: interrupts.Interrupts
    bar: ProgressBar
    start: init_from.Found | None
    command: str

    def to_the_end(self, clock: Clock) -> tuple[Clock, int]:
        """Returns (clock, exit code)."""
        experiment = self.experiment
        first, state, meta = self._state()
        if first:
            self.bar.note(f"resuming at step {first} of {experiment.total_steps}")
        clock = Clock(earlier=meta.get("seconds", 0.0) + clock.seconds)
        teacher_params = None
        if experiment.teacher is not None:
            teacher_params = sharding.place(experiment.teacher.params, experiment.teacher_shardings)
        drawn = draw_pairs(experiment, self.workdir, teacher_params, self.bar)
        calls, pace = dispatch.Calls(experiment), health.Pace.read(meta, experiment.config.run)
        while True:
            try:
                return clock, self._attempt(first, state, pace, teacher_params, drawn, calls, clock)
            except health.Diverged as error:
                pace, why, state = pace.slower(error), error.short, None  # the state's memory is needed
            first, state, meta = self._state()
            self.bar.note(f"{why}: back to step {first}, {pace.text}")

    def _state(self) -> tuple[int, DistillState, dict[str, Any]]:
        """(step, state, meta) of the newest good checkpoint, or of a fresh start."""
        found = self.checkpoints.restore_newest(self.experiment.shapes, self.experiment.shardings)
        if found is not None:
            return found
        state = experiments.initial_state(self.experiment)
        return 0, state if self.start is None else init_from.replace(state, self.start, self.experiment), {}

    def _attempt(self, first: int, state: DistillState, pace: health.Pace, teacher_params: Params | None,
                 drawn: dict[str, np.ndarray] | None, calls: dispatch.Calls, clock: Clock) -> int:
        """From step `first` to the report. Returns the exit code."""
        with MetricWriter(self.workdir, start_step=first, enabled=distributed.is_first()) as writer:
            show = showcase.Showcase(self.experiment, self.workdir, writer, teacher_params)
            try:
                code, state = self._loop(first, state, pace, teacher_params, drawn, calls, clock, writer, show)
            finally:
                gc.unfreeze()
            if code:
                return code
            self.signals.all_is_saved = True
            self.bar.note("measuring the final figures")
            show.finish(state, seconds=clock.seconds, to_first_step=clock.seconds_to_first_step, command=self.command,
                        versions=workdirs.versions(), device=device_name())
        self.bar.close()
        return 0

    def _loop(self, first: int, state: DistillState, pace: health.Pace, teacher_params: Params | None, drawn: dict[str, np.ndarray] | None,
              calls: dispatch.Calls, clock: Clock, writer: MetricWriter, show: showcase.Showcase) -> tuple[int, DistillState]:
        """Iterations `first` to the end. Returns (exit code or 0, state)."""
        experiment, bar, checkpoints, signals = self.experiment, self.bar, self.checkpoints, self.signals
        config, recipe, every, total = experiment.config, experiment.recipe, experiment.config.run, experiment.total_steps
        key, probe_key, replicated = jax.random.key(config.seed), jax.random.key(config.seed + 1), recipe.layout.replicated
        probe_fn = probe_text = None
        if experiment.distils:
            levels = probes.run_levels(config.generator.noise)
            probe_fn = jax.jit(probes.make_probe(recipe, levels, count=_probe_count(experiment)), out_shardings=replicated)
            probe_text = experiment.fixed_text(_probe_count(experiment))
        monitor = health.Monitor(config.batch_size, jax.jit(health.parts, out_shardings=replicated), teacher_params, checkpoints.settled)
        scale = pace.argument(replicated)
        block = jax.default_backend() == "cpu"  # programs that queue up on fake devices deadlock

        def due(done: int) -> bool:
            return done == total or any(n and done % n == 0 for n in (every.save_every, every.keep_every, every.eval_every))

        def measure(done: int) -> None:
            """The figures of a saved step. A signal puts them off: the resumed run sees that they are missing."""
            with clock.pause(), contextlib.suppress(interrupts.Abandoned), signals.abandonable():
                figures = show.measure(done, state)
                if figures:
                    writer.write(done, done * config.batch_size / 1000, figures)
                    writer.flush()
                checkpoints.record(done, figures)

        batches = make_batches(experiment, first, drawn)
        if first < total:
            bar.note(f"{experiment.trained.network.num_params():,} parameters on {device_name()}; compiling the first step")
        if first == 0:
            show.samples(0, state)
        if first and every.eval_every and first % every.eval_every == 0 and first < total and not checkpoints.measured(first):
            measure(first)
        for steps in calls.plan(first):
            state, metrics, watched = calls(steps, state, teacher_params, key, batches, scale)
            done = steps.stop
            if block or steps.start == first:
                jax.block_until_ready(metrics)
            if steps.start == first:  # what tracing has left stays: Python would look at all of it again and again, a tenth of a fast step's time
                gc.collect()
                gc.freeze()
            monitor.add(steps.start + 1, watched)
            clock.count(len(steps) * config.batch_size)
            kimg = done * config.batch_size / 1000

            if done % every.log_every == 0 or done == total:
                figures = health.logged(metrics) | {"images_per_second": clock.images_per_second(), "seconds": clock.seconds} | pace.figures
                if probe_fn is not None and (done % every.probe_every == 0 or done == total):
                    with clock.pause():
                        probed = probe_fn(state, teacher_params, probe_key, probe_text)
                        figures |= jax.block_until_ready(probed) if block else probed
                monitor.line()  # one line late, so that the host never waits for the step it has just dispatched
                writer.write(done, kimg, {name: value for name, value in figures.items() if value is not None})
            bar.update(done, writer.latest)
            if done % every.sample_every == 0 or done == total:
                with clock.pause():
                    show.samples(done, state)
            checkpoints.check()
            stopped = signals.stop(done)
            if due(done) or stopped:
                with clock.pause():
                    monitor.everything(done, state)
                    writer.flush()
                    checkpoints.save(done, state, {"seconds": clock.seconds, "kimg": kimg} | pace.meta)
            if every.eval_every and done % every.eval_every == 0 and done < total and not stopped:
                measure(done)  # after the save, so that nothing is lost in these minutes
                stopped = signals.received if jax.process_count() == 1 else None
            if stopped:
                checkpoints.wait()
                bar.note(f"{signal.Signals(stopped).name}: saved step {done} of {total}; the same command resumes")
                return interrupts.EXIT_CODES[stopped], state
        checkpoints.wait()
        return 0, state


def _probe_count(experiment: Experiment) -> int:
    size = experiment.layout.mesh.size
    return -(-experiment.config.run.probe_images // size) * size


def draw_pairs(experiment: Experiment, workdir: pathlib.Path, teacher_params, bar: ProgressBar) -> dict[str, np.ndarray] | None:
    """The teacher's pairs of a regression term, None without one."""
    if experiment.recipe.regression is None:
        return None
    config, latents = experiment.config, dataclasses.replace(experiment.latents(), captions=experiment.captions)
    bar.note(f"{config.regression.num_pairs} pairs of the teacher: {workdir / pairs.FILE_NAME}")
    return pairs.open_pairs(workdir, count=config.regression.num_pairs, seed=config.seed, network=experiment.recipe.teacher,
                            params=teacher_params, spec=experiment.teacher_sampler(), latents=latents, layout=experiment.layout,
                            batch_per_device=config.run.batch_per_device)


def make_batches(experiment: Experiment, first: int, drawn: dict[str, np.ndarray] | None) -> Iterator[dict[str, Any] | None]:
    """Global device arrays from this process's share of each batch; None for ever in a run without images, captions and pairs."""
    config, layout = experiment.config, experiment.layout
    rows = sharding.local_rows(layout.batch, config.batch_size)
    where = dict(seed=config.seed, batch_size=config.batch_size, start_step=first, rows=rows)
    images = pair_batches = itertools.repeat(None)
    if experiment.source is not None or experiment.captions is not None:
        images = pipeline.make_batches(experiment.source, **where, num_threads=config.run.data_threads, captions=experiment.captions)
    if drawn is not None:
        pair_batches = pairs.batches(drawn, **where, captions=experiment.captions)

    def place(batch):
        return {name: sharding.from_rows(rows, batch[name], layout.batch, config.batch_size)
                for name in ("index", "image", "label", "text", "text_mask") if name in batch}

    for batch, pair in zip(images, pair_batches):
        given = {} if batch is None else place({name: value for name, value in batch.items() if name != "index"})
        yield (given | ({} if pair is None else {"pair": place(pair)})) or None
