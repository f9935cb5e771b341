"""Sums that leave the range of float16."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from fptq_compiler.lower.emitter import Emitter


def sum_of_squares(op: Emitter, node: ir.Node) -> tuple[Any, ...]:
    """`fptq.sum_of_squares` in float32, which its readers compute on in (lower.float_type)."""
    return (op.ReduceSumSquare(op.wide(node.inputs[0]), op.ints(-1), keepdims=1),)
