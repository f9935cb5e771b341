"""What target `ort-cuda` promises of its nodes: the forms for which the CUDA provider has kernels.

The CUDA provider need not be here: no provider fuses or splits these nodes, so that what stands
in the graph that the CPU provider has optimised is what will run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import onnx_ir as ir
from torch.fx import Node

from fptq_compiler.graph import ops
from fptq_compiler.graph.program import Program
from fptq_compiler.lower.blocks import BLOCK
from fptq_compiler.lower.element_type import element_type

INT4 = (ir.DataType.INT4, ir.DataType.UINT4)
PLAIN_INPUTS = 3  # of MatMulNBits: without zero-points and bias


def broken_promises(program: Program, written: ir.Model, optimized: ir.Model) -> list[str]:
    """The broken promises, in words; empty where the graphs are as they should be.

    Args:
        program: frozen; it says how many linears there are of each kind.
        written: the file's graph, functions inlined.
        optimized: what ONNX Runtime's CPU provider has made of it.
    """
    return [*_wrong_counts(program, optimized), *_wrong_forms(written), *_wrong_blocks(optimized)]


def _wrong_counts(program: Program, model: ir.Model) -> Iterator[str]:
    expected = Counter(_kernel(node) for node in program.call_nodes(ops.linear))
    found = Counter(node.op_type for node in model.graph.all_nodes())
    for name in ("MatMulInteger", "MatMulNBits"):
        if found[name] != expected[name]:
            yield f"{found[name]} {name}, expected {expected[name]}, one for each such linear"


def _kernel(linear: Node) -> str:
    """Integer matmuls read codes, and have no scales a block."""
    source, block = linear.args[0], linear.args[5]
    assert isinstance(source, Node)
    in_codes = source.target is ops.fake_quantize and not block
    return "MatMulInteger" if in_codes else "MatMulNBits"


def _wrong_forms(model: ir.Model) -> Iterator[str]:
    for node in model.graph.all_nodes():
        if node.op_type == "MatMulInteger":
            yield from _wrong_sums(node)
        if node.op_type == "DequantizeLinear" and element_type(node.inputs[0]) in INT4:
            yield f"{node.name}: DequantizeLinear reads an INT4 weight on every run, expected none"
        codes = {"QuantizeLinear": 2, "MatMulInteger": 0}.get(node.op_type)
        found = None if codes is None else element_type(node.inputs[codes])
        if codes is not None and found != ir.DataType.INT8:
            yield f"{node.name}: {node.op_type} with codes in {found}, expected INT8"


def _wrong_sums(matmul: ir.Node) -> Iterator[str]:
    """INT32 goes to float32: float16 ends at 65,504."""
    for reader in matmul.outputs[0].consumers():
        to = ir.DataType(reader.attributes["to"].as_int()) if reader.op_type == "Cast" else None
        if to != ir.DataType.FLOAT:
            yield f"{matmul.name}: its sums go to {to or reader.op_type}, expected FLOAT"


def _wrong_blocks(model: ir.Model) -> Iterator[str]:
    for node in model.graph.all_nodes():
        if node.op_type != "MatMulNBits":
            continue
        block = node.attributes["block_size"].as_int()
        inputs = sum(value is not None for value in node.inputs)
        if block != BLOCK or inputs != PLAIN_INPUTS:
            yield (
                f"{node.name}: MatMulNBits with blocks of {block} and {inputs} inputs, expected "
                f"{BLOCK} and {PLAIN_INPUTS}: its fast kernel takes no others"
            )

