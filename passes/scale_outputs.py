"""While the scales of kept codes are trained, they multiply a linear's outputs, not its weight.

    linear(x, Q(W), b)     ->  linear(x, W) · s / s₀ + b
    mean_shift(W, Q(W), b) ->  b + E[x] W - (E[x̂] W) · s / s₀

The gradient of a weight is a matmul as large as the linear; that of its outputs is there anyhow.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from fptq_compiler.graph.inputs import input_node
from fptq_compiler.graph.mean_shift import MeanShift
from fptq_compiler.graph.output_scales import OutputScale, ScaledShift, keeps_codes_by_row
from fptq_compiler.graph.pipeline import Effect, Pass, PassResult
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.surgery import add_module, call, call_module, replace
from fptq_compiler.passes.linears import LINEAR
from fptq_compiler.quant.modules import WeightFakeQuantizer


class ScaleOutputs(Pass):
    """Move the scales of a training copy behind its linears; it is trained, and not compiled."""

    requires = ("quantizers_placed", "calibrated", "folded")
    provides = ("outputs_scaled",)
    effect = Effect.PRESERVES

    def run(self, program: Program) -> PassResult:
        """Move each scale of a row of kept codes; scales of blocks of columns stay."""
        moved = 0
        for edge in [n for n in program.graph.nodes if n.op == "call_module"]:
            quantizer = program.module.get_submodule(str(edge.target))
            if not keeps_codes_by_row(quantizer):
                continue
            for reader in [*edge.users]:
                if reader.target is LINEAR and reader.args[1] is edge:
                    _scale_outputs(program, reader, quantizer)
                    moved += 1
                elif reader.op == "call_module":
                    _scale_shift(program, reader, quantizer)
        return PassResult(moved)


def _scale_outputs(program: Program, linear: Node, quantizer: WeightFakeQuantizer) -> None:
    x, edge, *bias = linear.args
    assert isinstance(edge, Node)
    linear.args = (x, input_node(edge))
    path = f"output_scales.{linear.name}"
    add_module(program.module, path, OutputScale(quantizer))
    readers = [*linear.users]
    graph, behind = program.graph, linear.next
    end = call_module(graph, behind, path, (linear,), like=linear)
    if bias and bias[0] is not None:
        end = call(graph, behind, torch.ops.aten.add.Tensor, (end, bias[0]), like=linear)
    for reader in readers:
        reader.replace_input_with(linear, end)


def _scale_shift(program: Program, node: Node, quantizer: WeightFakeQuantizer) -> None:
    shift = program.module.get_submodule(str(node.target))
    if not isinstance(shift, MeanShift):
        return
    weight = program.parameter(str(input_node(node).target))
    path = f"scaled_shifts.{node.name}"
    add_module(program.module, path, ScaledShift(quantizer, weight, shift))
    replace(node, call_module(program.graph, node, path, node.args[2:], like=node))
