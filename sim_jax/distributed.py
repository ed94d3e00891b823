"""Several processes that run as one: how they find each other, and how they agree.

    TPU pods                  nothing to say, JAX asks the machine (also several slices)
    SLURM (srun), Open MPI    nothing to say; one process a node takes all its GPUs, one process a GPU takes its own
    anything else             --coordinator=host:port --num_processes=N --process_id=I in each, or JAX_COORDINATOR_ADDRESS,
                              JAX_NUM_PROCESSES and JAX_PROCESS_ID in the environment; flags win

What they then have to agree on is in `processes`, whose names are to be had here too.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from sim_jax import rendezvous
from sim_jax.processes import by_first, check_same, check_shared, connect, is_first, say, several, together  # noqa: F401 (under one name)
from sim_jax.rendezvous import Failed  # noqa: F401

if TYPE_CHECKING:
    from absl import flags

MODES = ("auto", "on", "off")
_HELP = {
    "distributed": "Several processes: found by themselves on TPU pods, under SLURM and Open MPI; 'on' insists, 'off' stays alone.",
    "coordinator": "host:port of process 0, where processes do not find each other (or JAX_COORDINATOR_ADDRESS).",
    "num_processes": "How many processes there are (or JAX_NUM_PROCESSES).",
    "process_id": "Which of them this is, from 0 (or JAX_PROCESS_ID).",
    "start_timeout": "Seconds to wait for the other processes.",
}
_TIMEOUT = 300
_PATIENCE = 5.0       # seconds in which processes that fail alike do so
_LOST = re.compile(r"gloo.*fail|connection (closed|reset)|socket closed|coordination service|heartbeat|barrier.*(timed out|failed)", re.I)


class Place(NamedTuple):
    """Who this process is.

    Attributes:
      by: who says so, for messages.
      coordinator, count, index: "host:port", N, 0 ... N - 1; None on TPU pods, where JAX finds them.
      devices: the local GPUs that are its own; None for all.
    """

    by: str
    coordinator: str | None = None
    count: int | None = None
    index: int | None = None
    devices: list[int] | None = None


def define_flags(values: flags.FlagValues) -> None:
    """--distributed, --coordinator, --num_processes, --process_id, --start_timeout, for absl."""
    from absl import flags

    flags.DEFINE_enum("distributed", "auto", MODES, _HELP["distributed"], flag_values=values)
    flags.DEFINE_string("coordinator", None, _HELP["coordinator"], flag_values=values)
    for name in ("num_processes", "process_id"):
        flags.DEFINE_integer(name, None, _HELP[name], flag_values=values)
    flags.DEFINE_float("start_timeout", _TIMEOUT, _HELP["start_timeout"], flag_values=values)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The same for argparse."""
    group = parser.add_argument_group("several processes")
    group.add_argument("--distributed", choices=MODES, default="auto", help=_HELP["distributed"])
    group.add_argument("--coordinator", help=_HELP["coordinator"])
    for name in ("num_processes", "process_id"):
        group.add_argument(f"--{name}", type=int, help=_HELP[name])
    group.add_argument("--start_timeout", type=float, default=_TIMEOUT, help=_HELP["start_timeout"] + " (default %(default)s)")


def _whole(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name, "")
    if text and not text.isdecimal():
        raise ValueError(f"{name}: got {text!r}, allowed: a whole number")
    return int(text) if text else None


def _own_gpu(local_index: int | None, on_this_machine: int, environ: Mapping[str, str]) -> list[int] | None:
    """One process a machine has all its GPUs; of several each has one, unless the launcher shows each its own already."""
    alone = on_this_machine == 1 or len(environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")) == 1
    return None if alone or local_index is None else [local_index]


def _slurm(environ: Mapping[str, str]) -> Place | None:
    """Inside srun; a batch script itself, without srun, is one process."""
    nodes, count = environ.get("SLURM_STEP_NODELIST"), _whole(environ, "SLURM_STEP_NUM_TASKS") or _whole(environ, "SLURM_NTASKS")
    if not nodes or not count or "SLURM_PROCID" not in environ:
        return None
    first = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", nodes)
    port = environ.get("JAX_COORDINATOR_PORT") or str(61440 + (_whole(environ, "SLURM_JOB_ID") or 0) % 4096)
    here = int(re.match(r"\d+", environ.get("SLURM_STEP_TASKS_PER_NODE", "2")).group())
    return Place("SLURM", f"{first[1]}{first[2] or ''}:{port}", count, _whole(environ, "SLURM_PROCID"),
                 _own_gpu(_whole(environ, "SLURM_LOCALID"), here, environ))


def _open_mpi(environ: Mapping[str, str]) -> Place | None:
    count, here = _whole(environ, "OMPI_COMM_WORLD_SIZE"), _whole(environ, "OMPI_COMM_WORLD_LOCAL_SIZE") or 1
    if not count:
        return None
    uri, coordinator = environ.get("OMPI_MCA_orte_hnp_uri", ""), None
    job = uri.split(".")[0] if uri else environ.get("PMIX_NAMESPACE", "")
    port = environ.get("JAX_COORDINATOR_PORT") or 61440 + zlib.crc32(job.encode()) % 4096
    if host := re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", uri):
        coordinator = f"{host[1] or f'[{host[2]}]'}:{port}"
    elif here == count:  # Open MPI 5 tells no address; on one machine none is needed
        coordinator = f"127.0.0.1:{port}"
    return Place("Open MPI", coordinator, count, _whole(environ, "OMPI_COMM_WORLD_RANK"),
                 _own_gpu(_whole(environ, "OMPI_COMM_WORLD_LOCAL_RANK"), here, environ))


def find(values: Any, environ: Mapping[str, str], *, on_tpu: bool = False) -> Place | None:
    """Who this process is; None where it is alone.

    Args:
      values: with the flags as attributes.
      on_tpu: whether the machine has TPUs that JAX will use.
    Raises: ValueError for flags or variables that contradict each other, or are not enough.
    """
    if values.distributed == "off":
        return None
    if values.start_timeout <= 0:
        raise ValueError(f"--start_timeout: got {values.start_timeout:g}, allowed: seconds above 0")
    own = {"coordinator": values.coordinator or environ.get("JAX_COORDINATOR_ADDRESS"),
           "count": values.num_processes if values.num_processes is not None else _whole(environ, "JAX_NUM_PROCESSES"),
           "index": values.process_id if values.process_id is not None else _whole(environ, "JAX_PROCESS_ID")}
    own = {key: value for key, value in own.items() if value is not None}
    around = _slurm(environ) or _open_mpi(environ)
    if around is None and on_tpu and len(own) < 3:
        return Place("TPU pod", **own)
    if around is None and not own:
        if values.distributed == "on":
            raise ValueError("--distributed: got 'on', but this is no TPU pod, SLURM (srun) or Open MPI; allowed: with --coordinator, "
                             "--num_processes and --process_id")
        return None
    place = (around or Place("--coordinator"))._replace(**own)
    if place.count == 1 and not place.index:
        return None
    for flag, value in (("--num_processes", place.count), ("--process_id", place.index), ("--coordinator", place.coordinator)):
        if value is None:
            raise ValueError(f"{flag}: missing; {place.by} alone does not say it; allowed: --coordinator=host:port --num_processes=N "
                             "--process_id=I, all three")
    if place.count < 1:
        raise ValueError(f"--num_processes: got {place.count}, allowed: 1 or more")
    if not 0 <= place.index < place.count:
        raise ValueError(f"--process_id: got {place.index}, allowed: 0 to {place.count - 1}, as --num_processes is {place.count}")
    if not re.fullmatch(r"(\[[^\]]+\]|[^:\s]+):\d{1,5}", place.coordinator) or not 0 < int(place.coordinator.rsplit(":", 1)[1]) < 65536:
        raise ValueError(f"--coordinator: got {place.coordinator!r}, allowed: host:port")
    return place


def start(values: Any) -> None:
    """Meets the other processes, where there are any; before anything touches a device.

    Args: values: with the flags as attributes. Raises: ValueError where they do not come together.
    """
    import jax  # which finds out whether the machine has TPUs

    on_tpu = os.environ.get("TPU_ML_PLATFORM") == "JAX" and "tpu" in (jax.config.jax_platforms or "tpu")
    place = find(values, os.environ, on_tpu=on_tpu)
    if place is None or jax.distributed.is_initialized():
        return
    if place.by == "TPU pod":
        try:
            jax.distributed.initialize(place.coordinator, place.count, place.index, initialization_timeout=round(values.start_timeout))
        except Exception as error:  # of many types: no metadata server, an unknown kind of machine
            if values.distributed == "on":
                raise ValueError(f"--distributed: got 'on', but JAX cannot join the pod ({error})") from error
            print(f"note: one process, as this machine does not say that it is part of a pod ({error})", file=sys.stderr)
        return
    rendezvous.meet(place.coordinator, count=place.count, index=place.index, timeout=values.start_timeout)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(place.coordinator, place.count, place.index, local_device_ids=place.devices,
                               cluster_detection_method="deactivate", initialization_timeout=max(round(values.start_timeout), 30))
    sys.excepthook = _leave_on_error


def is_lost_partner(error: BaseException) -> bool:
    """Whether an error of JAX says that another process is gone."""
    return several() and type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError", "ValueError") and bool(_LOST.search(str(error)))


def fail(message: str, code: int) -> None:
    """Prints an error and ends this process, for errors that were not found `together`; with one process it only prints.

    Where all processes fail alike the first one alone prints. Where one fails, the others are told by its absence.
    """
    if not several():
        print(message, file=sys.stderr)
        return
    import jax
    from jax._src.distributed import global_state  # its key-value store answers even while others compute

    index, store = jax.process_index(), global_state.client

    def came(name: str, seconds: float) -> bool:
        try:
            store.blocking_key_value_get(f"sim_jax/{name}", max(1, round(1000 * seconds)))
        except Exception:  # of a type of its own
            return False
        return True

    if index == 0:
        print(message, file=sys.stderr)
        store.key_value_set("sim_jax/failed/0", message)
        deadline = time.monotonic() + _PATIENCE
        for other in range(1, jax.process_count()):  # its store has to outlive them
            came(f"failed/{other}", deadline - time.monotonic())
        time.sleep(0.2)
    else:
        if not came("failed/0", _PATIENCE):
            print(f"process {index}: {message}", file=sys.stderr)
        store.key_value_set(f"sim_jax/failed/{index}", message)
    leave(code)


def leave(code: int) -> None:
    """Ends this process at once, where it is one of several: the others must not wait for it at the end."""
    if several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _leave_on_error(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
    sys.__excepthook__(kind, error, traceback)
    leave(1)
