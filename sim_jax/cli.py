"""What every command shares: one line and exit code 2 for bad input, the compilation cache, how it was called."""

from __future__ import annotations

import ctypes
import os
import pathlib
import shlex
import sys
from collections.abc import Callable, Sequence

from sim_jax import distributed, storage


def guard(work: Callable[[], int]) -> int:
    """Runs a command: its exit code, or 2 with one line for bad input (ValueError), 1 for training that diverged, a full disk or another process
    that is gone, 130 for Ctrl-C. Of several processes that refuse their input together, the first one prints why."""
    try:
        return _guard_processes(work)
    except ValueError as error:
        if os.environ.get("SIM_JAX_TRACEBACK"):  # for our own bugs
            raise
        message = f"error: {' '.join(str(error).split())}"
        if not isinstance(error, distributed.Failed):
            distributed.fail(message, 2)
        elif not error.told_elsewhere:
            print(message, file=sys.stderr)
        return 2
    except (FloatingPointError, storage.StorageError) as error:
        distributed.fail(f"error: {error}", 1)
        return 1
    except OSError as error:
        if storage.reason(error) is None:
            raise
        distributed.fail(f"error: {error.filename or 'output'}: {storage.reason(error)}", 1)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _guard_processes(work: Callable[[], int]) -> int:
    """`work()`, and one line where it fails because another process is gone."""
    try:
        return work()
    except Exception as error:
        if not distributed.is_lost_partner(error):
            raise
        reason = " ".join(str(error).split())[:200]
        print(f"error: another process is gone, see its own output ({reason}); what is saved is intact, start all processes again",
              file=sys.stderr)
        distributed.leave(1)
        raise


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, unless JAX's own variable says where."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")) / "sim_jax" / "xla"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))


def keep_memory(*, one_device: bool | None = None) -> None:
    """Keeps freed memory in the process: every step of a CPU frees and takes the same large arrays, and giving them back to the system in
    between costs a tenth to a fifth of it in page faults [measured]. Only where the C library has glibc's knobs.

    Args:
      one_device: whether the CPU is one device; None: as the environment says.
    """
    if one_device is None:
        one_device = os.environ.get("JAX_NUM_CPU_DEVICES") == "1" or os.cpu_count() == 1
    try:
        tune = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    # One heap for all threads and no mappings end the faults of larger arrays, too (a step of digits 0.166 instead of 0.176 s); but two devices
    # take 0.27 instead of 0.15 s with them after compiling in the same process, in `malloc` of the heap that the compiler leaves.
    one_heap = ((-4, 0), (-8, 1)) if one_device else ()  # M_MMAP_MAX, M_ARENA_MAX
    for knob, value in ((-1, 2**31 - 1), (-2, 64 << 20), (-3, 32 << 20), *one_heap):  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD
        tune(knob, value)


def split_cpu(devices: int = 2) -> None:
    """Makes a CPU of several cores count as two devices, each with half of every batch: XLA runs many operations on one thread, and
    two programs side by side keep two cores busier than one program does (README, measured). GPUs and TPUs are unaffected.

    JAX_NUM_CPU_DEVICES, or XLA_FLAGS with a device count, says otherwise.
    """
    import jax

    told = "JAX_NUM_CPU_DEVICES" in os.environ or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if told or (os.cpu_count() or 1) < devices:
        return
    try:
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError:  # JAX is running already, as in a notebook
        return


def command_line(module: str, argv: Sequence[str]) -> str:
    """The command as one would type it again."""
    return shlex.join(["python", "-m", module, *argv[1:]])
