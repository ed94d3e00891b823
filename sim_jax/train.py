"""One run from top to bottom: check -> mesh -> data -> networks -> states -> restore -> loop -> report."""

from __future__ import annotations

import functools
import itertools
import json
import os
import pathlib
import platform
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview
from ml_collections import ConfigDict

from sim_jax import checkpoint, files, optim, pairs, probes, sharding, showcase, steps
from sim_jax import experiment as experiments
from sim_jax.data import images as image_data
from sim_jax.data import pipeline
from sim_jax.experiment import Experiment
from sim_jax.metrics import MetricWriter
from sim_jax.progress import Clock, ProgressBar

_PACKAGES = ("sim_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "ml-collections", "numpy")
_EXIT_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


def run(config: ConfigDict, workdir: str | pathlib.Path, *, command: str = "", overrides: Sequence[str] = ()) -> int:
    """Trains until `total_kimg`, resuming from whatever the workdir holds.

    Args:
      config: as from configs/common.py.
      workdir: checkpoints, figures, pictures and the report go here.
      command, overrides: recorded in config.json and the report.
    Returns: the exit code: 0 when done (at once, if the workdir's run is), 143 or 130 after SIGTERM or SIGINT (with the state saved).
    Raises: ValueError for bad input, before anything is compiled; FloatingPointError if training diverges.
    """
    clock = Clock()
    jax.config.update("jax_default_matmul_precision", config.precision)

    # Check everything, then claim the workdir.
    experiment = experiments.build(config)
    if experiment.source is not None:
        image_data.validate(experiment.source)
    main_process = jax.process_index() == 0
    workdir = _claim(pathlib.Path(workdir), experiment, command, overrides, write=main_process)
    bar = ProgressBar(experiment.total_steps, description=workdir.name, images_per_step=config.batch_size, enabled=main_process,
                      figures=("generator/loss", "fake_score/loss", "discriminator/loss", "denoiser/loss", "fd/generator"))

    with checkpoint.Checkpoints(workdir / "checkpoints", keep=config.run.keep) as checkpoints, _Signals() as signals:
        # States: the newest checkpoint, or a fresh start.
        first, seconds = checkpoints.latest() or 0, 0.0
        if first == experiment.total_steps and _reported_steps(workdir) == first:
            bar.note(f"step {first} of {first}: nothing is left to do; to measure again delete {workdir / 'report.json'}")
            return 0
        if first:
            state, meta = checkpoints.restore(first, experiment.shapes, experiment.shardings)
            seconds = meta["seconds"]
            bar.note(f"resuming at step {first} of {experiment.total_steps}")
        else:
            state = experiments.initial_state(experiment)
        clock = Clock(earlier=seconds + clock.seconds)
        teacher_params = None
        if experiment.teacher is not None:
            teacher_params = sharding.place(experiment.teacher.params, experiment.teacher_shardings)

        with MetricWriter(workdir, start_step=first, enabled=main_process) as writer:
            show = showcase.Showcase(experiment, workdir, writer, teacher_params)
            drawn = draw_pairs(experiment, workdir, teacher_params, bar)
            code, state = _loop(experiment, state, teacher_params, drawn, first, clock, checkpoints, writer, bar, show, signals)
            if code:
                return code
            signals.all_is_saved = True
            bar.note("measuring the final figures")
            show.finish(state, seconds=clock.seconds, to_first_step=clock.seconds_to_first_step, command=command,
                        versions=versions(), device=device_name())
        bar.close()
    if main_process:
        print(f"done in {clock.seconds:.0f} s: {workdir / 'report.html'}", flush=True)
    return 0


def _loop(experiment: Experiment, state, teacher_params, drawn: dict[str, np.ndarray] | None, first: int, clock: Clock, checkpoints, writer: MetricWriter,
          bar: ProgressBar, show: showcase.Showcase, signals: _Signals) -> tuple[int, Any]:
    """Iterations `first` to the end. Returns (exit code or 0, state)."""
    config, recipe = experiment.config, experiment.recipe
    every, total = config.run, experiment.total_steps
    key = jax.random.key(config.seed)
    replicated, step_fn = recipe.layout.replicated, make_step(experiment)
    probe_fn, probe_key = None, jax.random.key(config.seed + 1)
    if experiment.distils:
        levels = probes.run_levels(config.generator.noise)
        probe_fn = jax.jit(probes.make_probe(recipe, levels, count=_probe_count(experiment)), out_shardings=replicated)
    largest_fn = jax.jit(_largest, out_shardings=replicated)
    block = jax.default_backend() == "cpu"  # programs that queue up on fake devices deadlock

    batches = make_batches(experiment, first, drawn)
    if first < total:
        bar.note(f"{experiment.trained.network.num_params():,} parameters on {device_name()}; compiling the first step")
    if first == 0:
        show.samples(0, state)
    last_loss = None
    for step in range(first, total):
        state, metrics = step_fn(state, teacher_params, key, next(batches), **experiment.turns(step))
        done = step + 1
        if block or step == first:
            jax.block_until_ready(metrics)
        clock.count(config.batch_size)
        kimg = done * config.batch_size / 1000

        if done % every.log_every == 0 or done == total:
            figures = dict(metrics) | {"images_per_second": clock.images_per_second(), "seconds": clock.seconds}
            if probe_fn is not None and (done % every.probe_every == 0 or done == total):
                with clock.pause():
                    probed = probe_fn(state, teacher_params, probe_key)
                    figures |= jax.block_until_ready(probed) if block else probed
            if every.eval_every and done % every.eval_every == 0 and done < total:
                with clock.pause():
                    figures |= show.measure(done, state)
            # One line late, so that the host never waits for the step it has just dispatched.
            _stop_if_diverged(last_loss, done - every.log_every)
            last_loss = {name: value for name, value in metrics.items() if name.endswith(("/loss", "/grad_norm"))}
            writer.write(done, kimg, {name: value for name, value in figures.items() if value is not None})
        bar.update(done, writer.latest)
        if done % every.sample_every == 0 or done == total:
            with clock.pause():
                show.samples(done, state)
        stopped = signals.received
        if done % every.save_every == 0 or done == total or stopped:
            with clock.pause():
                _stop_if_diverged({k: v for k, v in metrics.items() if k.endswith(("/loss", "/grad_norm"))}, done)
                _stop_if_diverged({"the largest parameter": largest_fn(state)}, done)  # what the last step made, no loss has seen
                writer.flush()
                checkpoints.save(done, state, {"seconds": clock.seconds, "kimg": kimg})
        if stopped:
            checkpoints.wait()
            bar.note(f"{signal.Signals(stopped).name}: saved step {done} of {total}; the same command resumes")
            return _EXIT_CODES[stopped], state
    checkpoints.wait()
    return 0, state


def _probe_count(experiment: Experiment) -> int:
    size = experiment.layout.mesh.size
    return -(-experiment.config.run.probe_images // size) * size


def _largest(state) -> jax.Array:
    """The largest magnitude among the networks' parameters; NaN if there is one."""
    trained = [network.params for network in (state.generator, state.fake_score, state.discriminator) if network is not None]
    return jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(trained)]))


def _stop_if_diverged(metrics: dict[str, Any] | None, step: int) -> None:
    """Raises FloatingPointError naming the first figure that is not finite; nothing is saved after it."""
    for name, value in sorted((metrics or {}).items()):
        if not np.isfinite(float(value)):
            raise FloatingPointError(f"{name} is {float(value)} at or before step {step}: training has diverged; the last checkpoint is "
                                     "intact, lower the learning rate or start from it with another seed")


def make_step(experiment: Experiment):
    """The jitted training iteration: (state, teacher_params, key, batch, *, update_critic, update_generator) -> (state, metrics)."""
    return jax.jit(functools.partial(steps.train_step, experiment.recipe), donate_argnums=0,
                   static_argnames=("update_critic", "update_generator"), out_shardings=(experiment.shardings, experiment.layout.replicated))


def draw_pairs(experiment: Experiment, workdir: pathlib.Path, teacher_params, bar: ProgressBar) -> dict[str, np.ndarray] | None:
    """The teacher's pairs of a regression term, None without one."""
    if experiment.recipe.regression is None:
        return None
    config, latents = experiment.config, experiment.latents()
    bar.note(f"{config.regression.num_pairs} pairs of the teacher: {workdir / pairs.FILE_NAME}")
    return pairs.open_pairs(workdir, count=config.regression.num_pairs, seed=config.seed, network=experiment.recipe.teacher,
                            params=teacher_params, spec=experiment.teacher_sampler(), latents=latents, layout=experiment.layout,
                            batch_per_device=config.run.batch_per_device)


def make_batches(experiment: Experiment, first: int, drawn: dict[str, np.ndarray] | None) -> Iterator[dict[str, Any] | None]:
    """Global device arrays from this process's share of each batch; None for ever in a data-free run."""
    config, layout = experiment.config, experiment.layout
    where = dict(seed=config.seed, batch_size=config.batch_size, start_step=first, process_index=jax.process_index(),
                 process_count=jax.process_count())
    images = pair_batches = itertools.repeat(None)
    if experiment.source is not None:
        images = pipeline.make_batches(experiment.source, **where, num_threads=config.run.data_threads)
    if drawn is not None:
        pair_batches = pairs.batches(drawn, **where)

    def place(batch):
        return {name: jax.make_array_from_process_local_data(layout.batch, batch[name]) for name in ("index", "image", "label") if name in batch}

    for batch, pair in zip(images, pair_batches):
        given = ({} if batch is None else place({"image": batch["image"], "label": batch["label"]}))
        yield (given | ({} if pair is None else {"pair": place(pair)})) or None


class _Signals:
    """Remembers SIGTERM and SIGINT instead of dying, for the loop to save first; a second one kills as usual.

    Attributes:
      received: the signal.
      all_is_saved: set by the run once nothing is left to save; a signal then ends it at once.
    """

    received: int | None = None
    all_is_saved = False

    def _take(self, number: int, frame: Any) -> None:
        if self.all_is_saved:
            print(f"{signal.Signals(number).name}: everything is saved; the same command finishes the report", file=sys.stderr)
            raise SystemExit(_EXIT_CODES[number])
        self.received = number
        signal.signal(number, self._before[number])

    def __enter__(self) -> _Signals:
        self._before = {number: signal.signal(number, self._take) for number in _EXIT_CODES}
        return self

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _reported_steps(workdir: pathlib.Path) -> int | None:
    """The length of the run that report.json tells of."""
    path = workdir / "report.json"
    return checkpoint.read_json(path).get("steps") if path.is_file() and (workdir / "report.html").is_file() else None


def versions() -> dict[str, str]:
    """Versions of Python and of what the figures depend on."""
    out = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            out[name] = "not installed"
    return out


def device_name() -> str:
    """E.g. "8 x NVIDIA H100 80GB HBM3", or the CPU's model and cores."""
    count, device = jax.device_count(), jax.devices()[0]
    if device.platform != "cpu":
        return f"{count} x {device.device_kind}" if count > 1 else device.device_kind
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    name = names[0] if names else platform.processor() or "CPU"
    return f"{name} ({os.cpu_count()} cores{f' as {count} devices' if count > 1 else ''})"


def _lines(path: str) -> list[str]:
    try:
        return pathlib.Path(path).read_text().splitlines()
    except OSError:
        return []


def _claim(workdir: pathlib.Path, experiment: Experiment, command: str, overrides: Sequence[str], *, write: bool) -> pathlib.Path:
    """Makes the workdir this config's, or checks that it already is.

    Raises: ValueError if it cannot be written, belongs to another config or to a longer run, or holds something else.
    """
    record = {
        "config": experiments.plain(experiment.config),
        "network": json.loads(json.dumps(dict(experiment.trained.network.spec))),
        "ema_names": list(optim.ema_names(experiment.config.ema.halflife_kimg)),
        "overrides": list(overrides), "command": command, "versions": versions(), "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    path = workdir / "config.json"
    if path.exists():
        old = checkpoint.read_json(path)
        different = experiments.changes(old.get("config", {}), record["config"])
        if different:
            raise ValueError(f"workdir: {workdir} belongs to another config: {'; '.join(different[:6])}"
                             f"{f' and {len(different) - 6} more' if len(different) > 6 else ''}; choose another --workdir")
    elif (workdir / "checkpoints").exists():
        raise ValueError(f"workdir: {workdir} holds checkpoints but no config.json; choose another --workdir")
    done, config = checkpoint.latest_step(workdir / "checkpoints") or 0, experiment.config
    if done > experiment.total_steps:
        least = done * config.total_kimg / experiment.total_steps
        raise ValueError(f"total_kimg: got {config.total_kimg:g}, allowed: {least:g} or more, as {workdir} has come that far")
    workdir = files.make_folder(workdir)
    if write:
        text = json.dumps(record, indent=1, sort_keys=True).encode() + b"\n"
        files.write_atomically(path, lambda file: file.write(text), key="workdir")
        table = parameter_overview.get_parameter_overview(experiment.trained.network.shapes(), include_stats=False)
        files.write_atomically(workdir / "parameters.txt", lambda file: file.write(table.encode() + b"\n"), key="workdir")
    return workdir.absolute()
