"""Give freed tensors back to the system, so that the peak is what the compiler holds."""

from __future__ import annotations

import ctypes
import sys

M_MMAP_THRESHOLD = -3
THRESHOLD = 1 << 20
"""Bytes from which an allocation is a mapping of its own, gone when it is freed."""


def return_freed_memory() -> None:
    """Keep glibc from raising its mapping threshold, which fragments the heap with tensors.

    Other systems are left as they are. `tools/benchmark_compile.py` shows the peak.
    """
    if sys.platform != "linux":
        return
    try:
        ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, THRESHOLD)
    except (OSError, AttributeError):
        return  # another C library
