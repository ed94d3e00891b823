"""What accelerators can do: products a second and memory of one JAX device, from their makers' data sheets (dense, no sparsity).

TPUs: https://cloud.google.com/tpu/docs/system-architecture-tpu-vm and the page of each version; of v2, v3 and 7x a JAX device is one of a
chip's two cores. NVIDIA: data sheets of A100, H100, H200, L4, L40S and V100 (SXM where the name does not say PCIe).
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Device:
    """One JAX device.

    Attributes:
      bfloat16, tf32, float32: peak operations a second, two for a multiply and an add, in units of 1e12; None where it has none.
      memory: of the device, in units of 2^30 bytes.
    """

    bfloat16: float
    tf32: float | None
    float32: float | None
    memory: float


# By a part of `jax.Device.device_kind`; the first that is found counts.
TABLE = {
    "TPU v2": Device(22.5, None, None, 8),
    "TPU v3": Device(61.5, None, None, 16),
    "TPU v4": Device(275, None, None, 32),
    "TPU v5 lite": Device(197, None, None, 16),
    "TPU v5e": Device(197, None, None, 16),
    "TPU v5": Device(459, None, None, 95),
    "TPU v6 lite": Device(918, None, None, 32),
    "TPU v6e": Device(918, None, None, 32),
    "TPU7x": Device(1153.5, None, None, 96),
    "H200": Device(989.4, 494.7, 66.9, 141),
    "H100 PCIe": Device(756, 378, 51, 80),
    "H100": Device(989.4, 494.7, 66.9, 80),
    "A100-SXM4-80GB": Device(312, 156, 19.5, 80),
    "A100 80GB": Device(312, 156, 19.5, 80),
    "A100": Device(312, 156, 19.5, 40),
    "L40S": Device(362, 183, 91.6, 48),
    "L4": Device(121, 60, 30.3, 24),
    "V100": Device(15.7, None, 15.7, 16),
}


def find(kind: str) -> Device | None:
    """The device whose name is in `kind`, `jax.Device.device_kind`; None for one that is not in the table."""
    return next((device for name, device in TABLE.items() if name.lower() in kind.lower()), None)


def peak_flops(kind: str, dtype: str, precision: str) -> float | None:
    """Operations a second of one device.

    Args:
      kind: `jax.Device.device_kind`.
      dtype: that the network computes in, "float32" or "bfloat16".
      precision: of float32 products, as in `config.precision`: on GPUs "highest" is float32 and all else tf32; TPUs make float32 products
      of 6, 3 or 1 bfloat16 ones.
    Returns: None where it is not known.
    """
    device = find(kind)
    if device is None:
        return None
    if dtype == "bfloat16":
        peak = device.bfloat16
    elif device.float32 is None:
        peak = device.bfloat16 / {"highest": 6, "high": 3}.get(precision, 1)
    else:
        peak = device.float32 if precision == "highest" or device.tf32 is None else device.tf32
    return peak * 1e12
