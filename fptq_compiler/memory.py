"""Give freed tensors back to the system, so that the peak is what the compiler holds.

Only glibc is told anything; other C libraries and systems are left as they are.
`tools/benchmark_compile.py` shows the peak.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import sys

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
LARGE = 4 << 20
"""Bytes from which an allocation is a mapping of its own, gone when it is freed: a smaller
limit costs page faults in every step of an optimiser, a larger one fragments the heap."""
KEPT = 64 << 20
"""Free bytes at the top of the heap that are kept for the next allocation."""


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    try:
        library = ctypes.CDLL("libc.so.6")
        _ = library.mallopt, library.malloc_trim
    except (OSError, AttributeError):
        return None
    return library


def map_large_tensors() -> None:
    """Keep glibc from raising its mapping threshold, which fragments the heap with tensors."""
    library = _glibc()
    if library is not None:
        library.mallopt(M_MMAP_THRESHOLD, LARGE)
        library.mallopt(M_TRIM_THRESHOLD, KEPT)


def return_freed_memory() -> None:
    """Hand back what lies free between smaller tensors: call it where a stage or block ends."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def collect_cycles() -> None:
    """Free what only cycles hold, as in graphs and ONNX models, and hand it back."""
    gc.collect()
    return_freed_memory()
