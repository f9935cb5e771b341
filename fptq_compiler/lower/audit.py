"""What stands in the written file: bytes and tensors by kind, requested against written."""

from __future__ import annotations

from collections import defaultdict

import onnx_ir as ir

from fptq_compiler.graph.program import Program
from fptq_compiler.report import AuditRow

NAMES = {"linear": "linear weights", "head": "head", "embedding": "embedding"}


def audit(program: Program, model: ir.Model) -> list[AuditRow]:
    """One row for each kind of tensor and type."""
    wanted = {
        f"{q.parameter}_codes": (NAMES[q.role], f"INT{q.bits}") for q in program.weight_quantizers
    }
    rows: dict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0])
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            continue
        written = tensor.dtype.name
        kind, requested = wanted.get(str(name), (_kind(str(name)), written))
        row = rows[kind, requested, written]
        row[0] += 1
        row[1] += tensor.nbytes
    return [AuditRow(*key, count, size) for key, (count, size) in sorted(rows.items())]


def _kind(name: str) -> str:
    if name.endswith("_scale"):
        return "weight scales"
    if name.endswith("weight"):
        return "float weights"
    return "other constants"
