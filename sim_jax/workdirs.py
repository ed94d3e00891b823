"""A workdir belongs to one config, and to one run at a time; what made it is in its config.json."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
from clu import parameter_overview

from sim_jax import checkpoint, files, optim, saved
from sim_jax import experiment as experiments
from sim_jax.experiment import Experiment

_PACKAGES = ("sim_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "ml-collections", "numpy")
LOCK = ".lock"


def claim(workdir: pathlib.Path, experiment: Experiment, *, command: str, overrides: Sequence[str], init: Mapping[str, Any] | None,
          accept_changes: bool, write: bool) -> pathlib.Path:
    """Makes the workdir this config's, or checks that it already is.

    Args:
      command, overrides: recorded.
      init: what the generator starts from, as the command says; recorded.
      accept_changes: another config takes over, if the saved state fits it; recorded.
      write: False on all processes but the first.
    Raises: ValueError if it cannot be written, belongs to another config or to a longer run, or holds something else.
    """
    record = {
        "config": experiments.plain(experiment.config), "network": json.loads(json.dumps(dict(experiment.trained.network.spec))),
        "ema_names": list(optim.ema_names(experiment.config.ema.halflife_kimg)), "init_from": init, "accepted_changes": [],
        "overrides": list(overrides), "command": command, "versions": versions(), "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    if experiment.captions is not None:
        record["text_encoder"] = experiment.captions.encoder
    path, done = workdir / "config.json", checkpoint.latest_step(workdir / "checkpoints") or 0
    if path.exists():
        record |= _continued(workdir, checkpoint.read_json(path), record, experiment, done, accept_changes)
    elif (workdir / "checkpoints").exists():
        raise ValueError(f"workdir: {workdir} holds checkpoints but no config.json; choose another --workdir")
    config = experiment.config
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


def _continued(workdir: pathlib.Path, old: Mapping[str, Any], record: Mapping[str, Any], experiment: Experiment, done: int, accept: bool
               ) -> dict[str, Any]:
    """What the record of a workdir's earlier part adds to that of this one."""
    accepted = list(old.get("accepted_changes") or [])
    different = experiments.changes(old.get("config", {}), record["config"])
    if different and not accept:
        raise ValueError(f"workdir: {workdir} belongs to another config: {saved.first(different)}; choose another --workdir, or let "
                         "the run go on with the new values by --accept_changes")
    if different:
        _check_fits(workdir / "checkpoints", experiment, different)
        accepted.append({"step": done, "changes": different, "command": record["command"], "written": record["written"]})
    before = old.get("init_from")
    if record["init_from"] is not None and _source(before) != _source(record["init_from"]):
        raise ValueError(f"--init_from: got {_source(record['init_from'])} for {workdir}, whose run started from {_source(before)}; "
                         "choose another --workdir")
    return {"accepted_changes": accepted, "init_from": before}


def _source(init: Mapping[str, Any] | None) -> str:
    return "its teacher or at random" if init is None else f"{init['path']} ({init['ema'] or 'first average'}; {', '.join(init['networks'])})"


def _check_fits(folder: pathlib.Path, experiment: Experiment, accepted: Sequence[str]) -> None:
    """Before config.json is changed: whether the newest saved state is one that the new config can go on with."""
    step = saved.newest_good(folder, {})
    different = [] if step is None else saved.differences(folder / str(step), experiment.shapes)
    if different:
        raise ValueError(f"--accept_changes: the state of step {step} does not fit {saved.first(list(accepted))}: {saved.first(different)}")


@contextlib.contextmanager
def locked(workdir: pathlib.Path, *, wanted: bool) -> Iterator[None]:
    """Keeps a second run out while this one lasts; the system lets go of the lock of a process that dies.

    Args:
      wanted: False on all processes but the first.
    Raises: ValueError if another run holds it.
    """
    if not wanted:
        yield
        return
    with open(workdir / LOCK, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ValueError(f"workdir: {workdir} is in use by {holder}; wait for it to end, or choose another --workdir") from None
        except OSError:  # a file system without locks
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield


def reported_steps(workdir: pathlib.Path) -> int | None:
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
