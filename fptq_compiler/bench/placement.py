"""Whether a model ran where it should: no copies between devices, no matmul on the CPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from fptq_compiler.bench.result import KernelRow

MATMULS: Final = (
    "MatMul", "FusedMatMul", "Gemm", "MatMulNBits", "MatMulInteger", "MatMulIntegerToFloat",
    "QLinearMatMul", "QGemm", "DynamicQuantizeMatMul", "GroupQueryAttention", "Attention",
)
COPIES: Final = ("MemcpyToHost", "MemcpyFromHost")


def misplaced(kernels: Iterable[KernelRow], provider: str) -> list[str]:
    """Says what ran elsewhere, one entry a kernel; nothing where all is well.

    Args:
        kernels: of one run, from its profile.
        provider: full name of the execution provider that was asked for.
    """
    found = []
    for row in kernels:
        copied = row.kernel in COPIES
        if copied or (row.kernel in MATMULS and row.provider != provider):
            where = "" if copied else f" on {row.provider.removesuffix('ExecutionProvider')}"
            found.append(f"{row.count} {row.kernel}{where}")
    return found
