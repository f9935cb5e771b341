"""What quantisation does to the mean of every linear's output: s = E[x] W - E[x̂] Ŵ."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fptq_compiler.graph.edges import transformed
from fptq_compiler.graph.inputs import input_node
from fptq_compiler.graph.mean_shift import Means, mean_shift
from fptq_compiler.graph.program import Program
from fptq_compiler.quant.modules import WeightFakeQuantizer

LINEAR = torch.ops.aten.linear.default


@torch.no_grad()
def mean_shifts(program: Program, means: Mapping[str, Means]) -> dict[str, Tensor]:
    """By linear node, the shift of every quantised linear whose means are known but the head.

    The head's weights have more bits, and its output is the widest of all.
    """
    quantizers = {q.module: q for q in program.weight_quantizers if q.role == "linear"}
    found: dict[str, Tensor] = {}
    for node in program.call_nodes(LINEAR):
        edge = input_node(node, 1)
        if node.name in means and edge.target in quantizers:
            quantizer = quantizers[str(edge.target)]
            module = program.module.get_submodule(quantizer.module)
            assert isinstance(module, WeightFakeQuantizer)
            weight = transformed(program, input_node(edge))
            found[node.name] = mean_shift(weight, module(weight), means[node.name])
    return found
