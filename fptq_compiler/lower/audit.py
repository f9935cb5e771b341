"""What stands in the written file: bytes and tensors by kind, requested against written."""

from __future__ import annotations

from collections import defaultdict

import onnx_ir as ir

from fptq_compiler.graph import ops
from fptq_compiler.graph.inputs import input_node
from fptq_compiler.graph.program import Program
from fptq_compiler.lower.blocks import BLOCK, BLOCKS
from fptq_compiler.report import AuditRow

FLOAT_BITS = 16
UINT8 = ir.DataType.UINT8
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
NAMES = {"linear": "linear weights", "head": "head", "embedding": "embedding"}


def audit(
    program: Program, model: ir.Model, weight_bits: int, head_bits: int
) -> list[AuditRow]:
    """One row for each kind of tensor and type.

    With quantised weights a matmul that still multiplies by a float weight is not what was
    asked for, whatever the reason: its row says so. The head may be asked for in float, and the
    routers of experts stay so.
    """
    float_weights = _float_matmul_weights(model) if weight_bits < FLOAT_BITS else set()
    residual = program.sites.residual
    if head_bits == FLOAT_BITS and residual is not None:
        float_weights.discard(residual.head.weight)
    float_weights -= {router.weight for router in program.sites.routers}
    wanted = {
        f"{q.parameter}_codes": (NAMES[q.role], f"INT{q.bits}") for q in program.weight_quantizers
    }
    widths = _embedding_widths(program)
    rows: dict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0])
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            continue
        written = tensor.dtype.name
        if tensor.dtype == UINT8 and 2 * tensor.shape.numpy()[-1] == widths.get(str(name)):
            written = "INT4"  # two to a byte
        codes = str(name).removesuffix(BLOCKS)
        if codes != name and codes in wanted:  # packed for MatMulNBits, BLOCK inputs in a row
            written = f"INT{8 * tensor.numpy().shape[-1] // BLOCK}"
        kind, requested = wanted.get(codes, (_kind(codes), written))
        if str(name) in float_weights:
            kind, requested = "float weights of matmuls", f"INT{weight_bits}"
        row = rows[kind, requested, written]
        row[0] += 1
        row[1] += tensor.nbytes
    return [AuditRow(*key, count, size) for key, (count, size) in sorted(rows.items())]


def _embedding_widths(program: Program) -> dict[str, int]:
    """How many values stand for a token, by the name of the codes."""
    found = {}
    for node in program.call_nodes(ops.embedding):
        codes = input_node(node, 1)
        found[str(codes.target)] = int(node.meta["val"].shape[-1])
    return found


def _float_matmul_weights(model: ir.Model) -> set[str]:
    """Matrices in float that a MatMul or Gemm reads, but for the factors of online maps."""
    found = set()
    for node in model.graph:
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        for value in node.inputs[:2]:
            while value is not None and (move := _move_behind(value)) is not None:
                value = move.inputs[0]
            if value is None or value.const_value is None or value.const_value.dtype not in FLOATS:
                continue
            if len(value.const_value.shape) == 2 and not str(value.name).startswith("online."):
                found.add(str(value.name))
    return found


def _move_behind(value: ir.Value) -> ir.Node | None:
    producer = value.producer()
    moves = producer is not None and producer.op_type in ("Transpose", "Identity")
    return producer if moves else None


def _kind(name: str) -> str:
    if name.endswith("_scale"):
        return "weight scales"
    if name.endswith("weight"):
        return "float weights"
    return "other constants"
