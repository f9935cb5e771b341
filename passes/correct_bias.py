"""Correct what quantisation does to the mean of every linear's output: b' = b + s.

The shift s is known from calibration (see `optimize.mean_shift`), and taking it back costs one
addition of a vector (bias correction, arXiv 1906.04721, section 4.2).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.fx import Node

from fptq_compiler.graph.biases import own_bias
from fptq_compiler.graph.inputs import input_node
from fptq_compiler.graph.pipeline import Effect, Pass, PassResult
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.surgery import free_name, get_parameter, set_parameter
from fptq_compiler.passes.linears import LINEAR


class CorrectBias(Pass):
    """Add the shifts to the biases; a linear that had none gets one."""

    requires = ("quantizers_placed", "calibrated", "folded")
    provides = ("bias_corrected",)
    effect = Effect.APPROXIMATES

    def __init__(self, shifts: Mapping[str, Tensor]) -> None:
        """Take by linear node the shift (N,) of its output's mean."""
        self.shifts = shifts

    @torch.no_grad()
    def run(self, program: Program) -> PassResult:
        """Correct each linear whose shift is known, once."""
        if "bias_corrected" in program.facts:
            return PassResult(0)
        parameters = {q.module: q.parameter for q in program.weight_quantizers}
        corrected = [n for n in program.call_nodes(LINEAR) if n.name in self.shifts]
        for node in corrected:
            parameter = parameters[str(input_node(node, 1).target)]
            _correct(program, node, parameter, self.shifts[node.name])
        return PassResult(len(corrected))


def _correct(program: Program, node: Node, parameter: str, shift: Tensor) -> None:
    if len(node.args) > 2 and isinstance(node.args[2], Node):
        shift = shift + program.parameter(str(input_node(node, 2).target)).double()
    name = free_name(program.module, f"{parameter}_bias")
    bias = shift.to(program.held(parameter).dtype)
    set_parameter(program.module, name, bias)
    corrected = get_parameter(program.graph, node, name, bias)
    own_bias(corrected, node.name)
    node.args = (*node.args[:2], corrected)
