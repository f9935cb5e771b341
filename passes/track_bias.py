"""While a program is trained, the bias of every quantised linear follows its weight.

    linear(x, Ŵ, b)  ->  linear(x, Ŵ, mean_shift(W, Ŵ, b)),  b + E[x] W - E[x̂] Ŵ

Rounding is done anew in every step, and a shift that was taken back once would be wrong in the
next. `settle_bias` makes a constant of what it is in the end.
"""

from __future__ import annotations

from collections.abc import Mapping

from fptq_compiler.graph.biases import own_bias
from fptq_compiler.graph.edges import edges_behind, weight_end
from fptq_compiler.graph.inputs import input_node
from fptq_compiler.graph.mean_shift import Means, MeanShift
from fptq_compiler.graph.pipeline import Effect, Pass, PassResult
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.surgery import add_module, call_module
from fptq_compiler.passes.linears import LINEAR


class TrackBias(Pass):
    """Put the shift of the mean on the bias of each linear whose input's means are known."""

    requires = ("quantizers_placed", "calibrated", "folded")
    provides = ("bias_tracked",)
    effect = Effect.APPROXIMATES

    def __init__(self, means: Mapping[str, Means]) -> None:
        """Take by linear node the means (K,) of its input, exact and as quantised."""
        self.means = means

    def run(self, program: Program) -> PassResult:
        """Track each linear with a quantised weight but the head, once."""
        if "bias_tracked" in program.facts:
            return PassResult(0)
        quantizers = {q.module for q in program.weight_quantizers if q.role == "linear"}
        tracked = 0
        for node in program.call_nodes(LINEAR):
            rounded = input_node(node, 1)
            if node.name not in self.means or rounded.target not in quantizers:
                continue
            weight = input_node(rounded)
            parameter = weight_end(program, weight)
            assert parameter is not None, f"{rounded.name} rounds no parameter"
            shift = MeanShift(self.means[node.name], edges_behind(program, parameter))
            path = f"mean_shifts.{node.name}"
            add_module(program.module, path, shift.to(program.device))
            bias = node.args[2:3]
            call = call_module(program.graph, node, path, (weight, rounded, *bias), like=node)
            own_bias(call, node.name)
            node.args = (*node.args[:2], call)
            tracked += 1
        return PassResult(tracked)
