"""What several processes have to agree on; with one process, nothing.

Every process runs the same program on its own part of every array. Therefore each of them has to take the same decisions: what
depends on files, clocks or input is decided `together`, or by the first process for all. Files are written by the first alone.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import pathlib
import socket
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sim_jax.rendezvous import Failed

T = TypeVar("T")

_TEXT = 2048          # bytes of a message between processes
_VISIBLE = 60.0       # seconds after which a file of the first process is seen by all


def agreed(number: int) -> int:
    """The first process's number (32 bits), on all of them."""
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils  # only where there are several processes

    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def meet(place: str) -> None:
    """Waits for the other processes."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(place)


def connect(mesh: Mesh) -> None:
    """Opens the connections of a mesh's collectives while the processes are together. Gloo (CPUs) opens each at its first use and gives up
    where one process comes 30 s after another, as they do from compiling on a busy machine."""
    if not several() or jax.default_backend() != "cpu":
        return
    cut = NamedSharding(mesh, P(mesh.axis_names))
    ones = jax.make_array_from_callback((mesh.size,), cut, lambda index: np.ones(1, np.float32))
    meet("processes/connect")
    for count in range(1, len(mesh.axis_names) + 1):
        for axes in itertools.combinations(mesh.axis_names, count):
            rest = tuple(name for name in mesh.axis_names if name not in axes)
            add = jax.shard_map(lambda x, axes=axes: jax.lax.psum(x, axes), mesh=mesh, in_specs=P(mesh.axis_names), out_specs=P(rest))
            jax.block_until_ready(jax.jit(add)(ones))


def several() -> bool:
    """Whether this process is one of several; touches no device where it is alone."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this is the process that writes files and talks."""
    return not several() or jax.process_index() == 0


def say(text: str) -> None:
    """Prints it once."""
    if is_first():
        print(text, flush=True)


def _everybody_s(text: str) -> list[str]:
    """The texts of all processes, by their index; cut where they are long."""
    from jax.experimental import multihost_utils

    mine = np.zeros(_TEXT, np.uint8)
    data = text.encode()[:_TEXT]
    mine[: len(data)] = np.frombuffer(data, np.uint8)
    return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in np.asarray(multihost_utils.process_allgather(mine))]


def together(work: Callable[[], T]) -> T:
    """`work()`, or an error in all processes if it fails in any of them: none waits for one that has given up.

    Bad input is then told once, by the first process. `work` must not use other processes unless it fails in all of them alike.
    Raises: what `work` raises; ValueError (RuntimeError for anything but bad input) where it failed elsewhere.
    """
    if not several():
        return work()
    result, failure = None, None
    try:
        result = work()
    except Exception as error:
        failure = error
    kind = "" if failure is None else "input: " if isinstance(failure, ValueError) else "error: "
    told = _everybody_s(kind and f"{kind}{type(failure).__name__ + ': ' if kind == 'error: ' else ''}{failure}")
    index = next((i for i, text in enumerate(told) if text), None)
    if index is None:
        return result
    if failure is not None and not isinstance(failure, ValueError):
        raise failure
    kind, message = told[index].split(": ", 1)
    message = message if index == 0 else f"process {index}: {message}"
    if kind == "input":
        raise Failed(message, told_elsewhere=jax.process_index() != 0)
    raise RuntimeError(message)


def by_first(work: Callable[[], Any]) -> None:
    """`work()` in the first process, which alone writes files; the others wait for it, and fail if it fails."""
    together(lambda: work() if is_first() else None)


def check_same(what: str, text: str) -> None:
    """Raises ValueError in all processes where they were given different things."""
    if not several():
        return
    digests = _everybody_s(hashlib.sha256(text.encode()).hexdigest())
    other = next((i for i, digest in enumerate(digests) if digest != digests[0]), None)
    if other is not None:
        raise Failed(f"{what}: process {other} was given something else than process 0; start the same command in every process",
                     told_elsewhere=not is_first())


def check_shared(folder: pathlib.Path) -> None:
    """Raises ValueError in all processes where one of them sees another `folder` under that name: a disk of its own machine, say."""
    if not several():
        return
    token = folder / f".shared.{agreed(time.time_ns() % 2**31)}"
    by_first(token.touch)

    def look() -> None:
        deadline = time.monotonic() + _VISIBLE
        while not token.exists():  # network file systems remember for a while that a file was not there
            if time.monotonic() > deadline:
                raise ValueError(f"workdir: got {str(folder)!r}, which is another folder on {socket.gethostname()} than on process 0's "
                                 "machine; allowed: one on a file system that all processes share")
            time.sleep(0.2)
            if folder.is_dir():
                os.listdir(folder)

    try:
        together(look)
    finally:
        by_first(lambda: token.unlink(missing_ok=True))
