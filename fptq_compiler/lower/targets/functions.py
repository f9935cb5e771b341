"""Functions that a file carries: a node of the domain `fptq` with its meaning as the body.

ONNX Runtime puts the body in place of the node when it loads the file, unless a library of
custom operators brings a kernel of that domain and name; so one file is portable, and fast where
such a library is.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from fptq_compiler.lower.emitter import Emitter
from fptq_compiler.lower.targets.carried import DOMAIN
from fptq_compiler.lower.targets.types import FLOAT, INT8

QUANTIZED_LINEAR = "QuantizedLinear"


def call_quantized_linear(op: Emitter, x: ir.Node, weight: Any, scale: Any) -> Any:
    """Call the function on the codes behind a DequantizeLinear and a weight (K, N) in codes."""
    codes, step, zero_point = x.inputs
    return op.make(
        QUANTIZED_LINEAR, codes, step, zero_point, weight, scale, domain=DOMAIN
    )


def quantized_linear(opset: int) -> ir.Function:
    """Static INT8 codes times INT4 or INT8 weights, summed in INT32, scaled in float32.

    x (..., K) INT8, its scale and zero-point scalars, weight (K, N), its scale (N,) -> (..., N)
    in the float type of the scales. INT32 goes to float32 and not to float16, which ends at
    65,504.
    """
    names = ("x", "x_scale", "x_zero_point", "weight", "weight_scale")
    inputs = [ir.Value(name=name) for name in names]
    x, x_scale, x_zero_point, weight, weight_scale = inputs
    op = Emitter("quantized_linear")
    total = op.MatMulInteger(x, op.Cast(weight, to=INT8), x_zero_point)
    scale = op.Mul(op.Cast(x_scale, to=FLOAT), op.Cast(weight_scale, to=FLOAT))
    y = op.CastLike(op.Mul(op.Cast(total, to=FLOAT), scale), x_scale)
    graph = ir.Graph(
        inputs, (y,), nodes=op.nodes, opset_imports={"": opset}, name=QUANTIZED_LINEAR
    )
    return ir.Function(DOMAIN, QUANTIZED_LINEAR, graph=graph, attributes=())
