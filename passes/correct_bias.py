"""Correct what quantisation does to the mean of every linear's output: b' = b + E[x] W - E[x̂] Ŵ.

Rounding errors of weights do not average out where the inputs have a mean: they shift every
token's output by the same vector. That vector is known from calibration, and subtracting it
costs one addition of a vector (bias correction, arXiv 1906.04721, section 4.2).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.fx import Node

from fptq_compiler.graph.edges import transformed
from fptq_compiler.graph.inputs import input_node
from fptq_compiler.graph.pipeline import Effect, Pass, PassResult
from fptq_compiler.graph.program import Program, WeightQuantizer
from fptq_compiler.graph.surgery import get_parameter, set_parameter
from fptq_compiler.passes.linears import LINEAR
from fptq_compiler.quant.modules import WeightFakeQuantizer


class CorrectBias(Pass):
    """Add the correction to the bias of every quantised linear but the head.

    The head's weights have more bits, and its output is the widest of all.
    """

    requires = ("quantizers_placed", "calibrated", "folded")
    provides = ("bias_corrected",)
    effect = Effect.APPROXIMATES

    def __init__(self, means: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Take by linear node the means (K,) of its input, exact and as quantised."""
        self.means = means

    @torch.no_grad()
    def run(self, program: Program) -> PassResult:
        """Correct each linear whose means are known, once."""
        if "bias_corrected" in program.facts:
            return PassResult(0)
        quantizers = {q.module: q for q in program.weight_quantizers if q.role == "linear"}
        changed = 0
        for node in program.call_nodes(LINEAR):
            edge = input_node(node, 1)
            if node.name in self.means and edge.target in quantizers:
                _correct(program, node, quantizers[str(edge.target)], *self.means[node.name])
                changed += 1
        return PassResult(changed)


def _correct(
    program: Program, node: Node, quantizer: WeightQuantizer, exact: Tensor, quantized: Tensor
) -> None:
    module = program.module.get_submodule(quantizer.module)
    assert isinstance(module, WeightFakeQuantizer)
    weight = transformed(program, input_node(input_node(node, 1)))
    shift = weight.double() @ exact.double() - module(weight).double() @ quantized.double()
    if len(node.args) > 2 and isinstance(node.args[2], Node):
        shift = shift + transformed(program, input_node(node, 2)).double()
    name = f"{quantizer.parameter}_bias"
    bias = shift.to(weight.dtype)
    set_parameter(program.module, name, bias)
    node.args = (*node.args[:2], get_parameter(program.graph, node, name, bias))
