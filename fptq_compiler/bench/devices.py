"""What a GPU can do at best, and the least time that follows from it: the floor of a call.

Rates are the vendor's, for dense matrices on tensor cores, float16 with float32 sums.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from fptq_compiler.errors import RecipeError

_GIGA: Final = 1e9
_TERA: Final = 1e12


@dataclass(frozen=True)
class Device:
    """A device's limits.

    Attributes:
        name: as nvidia-smi gives it.
        bandwidth: bytes a second from its memory.
        float16: operations a second; a multiplication and its addition are two.
        int8: the same in INT8.
    """

    name: str
    bandwidth: float
    float16: float
    int8: float

    def floor(self, moved: float, operations: float, *, integer: bool) -> float:
        """Gives the seconds below which no kernel can be.

        Args:
            moved: bytes that must come from memory at least once.
            operations: of all matmuls.
            integer: whether those are in INT8.
        """
        return max(moved / self.bandwidth, operations / (self.int8 if integer else self.float16))


DEVICES: Final[Mapping[str, tuple[float, float, float]]] = {
    "NVIDIA A100-SXM4-40GB": (1555, 312, 624),
    "NVIDIA A100-PCIE-40GB": (1555, 312, 624),
    "NVIDIA A100-SXM4-80GB": (2039, 312, 624),
    "NVIDIA A100 80GB PCIe": (1935, 312, 624),
    "NVIDIA H100 80GB HBM3": (3350, 989, 1979),
    "NVIDIA H100 PCIe": (2000, 756, 1513),
    "NVIDIA H100 NVL": (3938, 835, 1671),
    "NVIDIA H200": (4800, 989, 1979),
    "NVIDIA L4": (300, 121, 242),
    "NVIDIA GeForce RTX 4090": (1008, 165, 661),
}
"""By nvidia-smi's name: GB/s, 10^12 float16 operations a second, 10^12 INT8 ones."""


def device_of(
    name: str, bandwidth: float | None, float16: float | None, int8: float | None
) -> Device:
    """Gives the limits of a device, from the table or as they are given.

    Args:
        name: of the device.
        bandwidth: GB/s, in place of the table's.
        float16: 10^12 operations a second, in place of the table's.
        int8: the same in INT8.

    Raises:
        RecipeError: the table does not know the device, and not all three are given.
    """
    known = DEVICES.get(name, (None, None, None))
    gigabytes, half, byte = (
        rate if given is None else given
        for given, rate in zip((bandwidth, float16, int8), known, strict=True)
    )
    if gigabytes is None or half is None or byte is None:
        message = (
            f"{name}: its limits are not known here (known are {', '.join(DEVICES)}); give "
            "--bandwidth, --tops and --int8-tops"
        )
        raise RecipeError(message)
    return Device(name, gigabytes * _GIGA, half * _TERA, byte * _TERA)


def gpu_name() -> str:
    """Gives the name of the first GPU, or "CPU" where nvidia-smi finds none."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "CPU"
    return found.stdout.strip().splitlines()[0]
