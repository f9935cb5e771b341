"""What target `tensorrt` promises of its nodes: the quantised forms that TensorRT knows.

It fuses Q/DQ into its kernels by itself, so that the promise is of the written file: every
quantised linear is a MatMul on a weight in codes, behind an activation in codes where the program
has one there, and every activation is symmetric INT8.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from fptq_compiler.graph import ops
from fptq_compiler.graph.program import Program
from fptq_compiler.lower.element_type import element_type

BLOCKS = (64, 128)


def broken_promises(program: Program, written: ir.Model, optimized: ir.Model) -> list[str]:
    """The broken promises, in words; empty where the file is as it should be.

    Args:
        program: frozen; it says how many linears there are of each kind.
        written: the file's graph.
        optimized: what ONNX Runtime has made of it, which is not what TensorRT will.
    """
    linears = program.call_nodes(ops.linear)
    in_codes = sum(getattr(n.args[0], "target", None) is ops.fake_quantize for n in linears)
    found = [n for n in written.graph if n.op_type == "MatMul" and _is_weight(_codes(n, 1))]
    behind = [n for n in found if _codes(n, 0) is not None]
    broken = [
        f"{have} {what}, expected {want}, one for each such linear"
        for have, want, what in (
            (len(found), len(linears), "MatMul on a weight in codes"),
            (len(behind), in_codes, "of them behind an activation in codes"),
        )
        if have != want
    ]
    for node in written.graph:
        if node.op_type == "QuantizeLinear":
            broken += _wrong_zero_point(node)
        if node.op_type == "DequantizeLinear":
            broken += _wrong_blocks(node)
    return broken


def _codes(matmul: ir.Node, index: int) -> ir.Value | None:
    """The codes behind an input that is dequantised."""
    value = matmul.inputs[index]
    producer = value.producer() if value is not None else None
    dequantized = producer is not None and producer.op_type == "DequantizeLinear"
    return producer.inputs[0] if producer is not None and dequantized else None


def _is_weight(codes: ir.Value | None) -> bool:
    return codes is not None and codes.is_initializer()


def _wrong_zero_point(quantize: ir.Node) -> Iterator[str]:
    value = quantize.inputs[2]
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    found = "unknown" if tensor is None else f"{tensor.dtype} {tensor.numpy()}"
    if found != f"{ir.DataType.INT8} 0":
        yield f"{quantize.name}: QuantizeLinear with zero-point {found}, expected INT8 0"


def _wrong_blocks(dequantize: ir.Node) -> Iterator[str]:
    value = dequantize.inputs[0]
    if element_type(value) != ir.DataType.INT4:
        return
    attribute = dequantize.attributes.get("block_size")
    block = attribute.as_int() if attribute is not None else 0
    inputs = sum(v is not None for v in dequantize.inputs)
    if block not in BLOCKS or inputs != 2:
        yield (
            f"{dequantize.name}: INT4 weight in blocks of {block} with {inputs} inputs, expected "
            "blocks of 64 or 128 and no zero-point"
        )
