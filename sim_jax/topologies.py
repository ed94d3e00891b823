"""Devices by name, without having them: "v5e:2x4" are the eight chips of a TPU v5e slice, "h100:8" eight GPUs.

A TPU slice is described by libtpu, which also compiles for it (`compiles`); everything else is stood in for by CPU devices, on which
shapes and shardings are the same.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from collections.abc import Sequence
from typing import Any

from sim_jax import devices

# generation: (device kind, JAX devices a chip, numbers in its shape, how Cloud names a slice of n chips)
_TPUS = {
    "v2": ("TPU v2", 2, 2, lambda n: f"v2-{2 * n}"), "v3": ("TPU v3", 2, 2, lambda n: f"v3-{2 * n}"),
    "v4": ("TPU v4", 1, 3, lambda n: f"v4-{2 * n}"), "v5e": ("TPU v5 lite", 1, 2, lambda n: f"v5litepod-{n}"),
    "v5p": ("TPU v5", 1, 3, lambda n: f"v5p-{2 * n}"), "v6e": ("TPU v6 lite", 1, 2, lambda n: f"v6e-{n}"),
    "tpu7x": ("TPU7x", 2, 3, lambda n: f"tpu7x-{2 * n}"),
}
_GPUS = {
    "v100": "Tesla V100-SXM2-16GB", "l4": "NVIDIA L4", "l40s": "NVIDIA L40S", "a100-40": "NVIDIA A100-SXM4-40GB",
    "a100-80": "NVIDIA A100-SXM4-80GB", "h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices of one kind.

    Attributes:
      name: as given.
      kind: as `jax.Device.device_kind` has it.
      count: JAX devices.
      slice: a TPU slice as Cloud names it; None for GPUs.
    """

    name: str
    kind: str
    count: int
    slice: str | None = None

    @property
    def memory(self) -> int:
        """Bytes of one device."""
        return int(devices.find(self.kind).memory * 2**30)


def parse(name: str) -> Topology:
    """The topology of that name. Raises: ValueError with what is allowed."""
    family, _, shape = name.partition(":")
    try:
        sizes = [int(n) for n in shape.split("x")]
        if family in _TPUS:
            kind, cores, axes, cloud = _TPUS[family]
            if len(sizes) == axes and min(sizes) > 0:
                return Topology(name, kind, math.prod(sizes) * cores, cloud(math.prod(sizes)))
        elif family in _GPUS and len(sizes) == 1 and sizes[0] > 0:
            return Topology(name, _GPUS[family], sizes[0])
    except ValueError:
        pass
    tpus = ", ".join(f"{family}:{'x'.join('XYZ'[:entry[2]])}" for family, entry in _TPUS.items())
    raise ValueError(f"--topology: got {name!r}, allowed: chips of a TPU ({tpus}), such as v5e:2x4, or a number of GPUs "
                     f"({', '.join(f'{gpu}:N' for gpu in _GPUS)}), such as h100:8")


def compiles(topology: Topology) -> bool:
    """Whether programs for it can be compiled here: TPUs, where libtpu is installed."""
    return topology.slice is not None and importlib.util.find_spec("libtpu") is not None


def tpu_devices(topology: Topology) -> Sequence[Any]:
    """libtpu's description of the slice. Raises: ValueError for a shape that does not exist."""
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no machine to ask
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing is run, so several plans at once are no conflict
    os.environ["TPU_ACCELERATOR_TYPE"] = topology.slice
    shape = topology.name.partition(":")[2]
    host = {"chips_per_host_bounds": [1, 1, 1]} if set(shape.split("x")) == {"1"} else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **host).devices
    except Exception as error:  # the plugin's own types
        raise ValueError(f"--topology: got {topology.name!r}, allowed: slices that libtpu knows ({' '.join(str(error).split())[:160]})") from None


def stand_ins(count: int) -> Sequence[Any]:
    """That many CPU devices. Raises: ValueError if JAX already runs with fewer."""
    import jax

    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # it runs already
        pass
    found = jax.devices("cpu")
    if len(found) < count:
        raise ValueError(f"--topology: needs {count} CPU devices as stand-ins, JAX runs with {len(found)}; allowed: a fresh process")
    return found[:count]
