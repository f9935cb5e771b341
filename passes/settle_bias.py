"""After training, biases that followed their weights become parameters.

linear(x, Ŵ, mean_shift(W, Ŵ, b))  ->  linear(x, Ŵ, b'), computed in float64
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from fptq_compiler.graph.biases import own_bias, owner_of_bias
from fptq_compiler.graph.inputs import input_node
from fptq_compiler.graph.mean_shift import MeanShift
from fptq_compiler.graph.pipeline import Effect, Pass, PassResult
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.surgery import free_name, get_parameter, replace, set_parameter


class SettleBias(Pass):
    """Replace every shift of a mean by its value; all transforms are merged."""

    requires = ("folded",)
    provides = ("bias_settled",)
    effect = Effect.APPROXIMATES

    @torch.no_grad()
    def run(self, program: Program) -> PassResult:
        """Settle all that is tracked."""
        tracked = [n for n in program.graph.nodes if _is_tracked(program, n)]
        for node in tracked:
            weight, rounded = input_node(node), input_node(node, 1)
            values: list[Tensor] = [program.parameter(str(weight.target))]
            values.append(program.module.get_submodule(str(rounded.target))(values[0]))
            if len(node.args) > 2 and node.args[2] is not None:
                values.append(program.parameter(str(input_node(node, 2).target)))
            shift = program.module.get_submodule(str(node.target))
            bias = shift(*(value.double() for value in values)).to(values[0].dtype)
            name = free_name(program.module, f"{weight.target}_bias")
            set_parameter(program.module, name, bias)
            settled = get_parameter(program.graph, node, name, bias)
            owner = owner_of_bias(node)
            assert owner is not None, f"{node.name} is the bias of no linear"
            own_bias(settled, owner)
            replace(node, settled)
        return PassResult(len(tracked))


def _is_tracked(program: Program, node: Node) -> bool:
    if node.op != "call_module":
        return False
    return isinstance(program.module.get_submodule(str(node.target)), MeanShift)
