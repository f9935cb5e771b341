"""Run a program with quantisers as if it had none."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from fptq_compiler.graph.biases import owner_of_bias
from fptq_compiler.graph.edges import transformed, weight_end
from fptq_compiler.graph.evaluate import Environment, run_node
from fptq_compiler.graph.inputs import input_node
from fptq_compiler.graph.mean_shift import MeanShift
from fptq_compiler.graph.program import Program

LINEAR = torch.ops.aten.linear.default


class Bypass:
    """A block runner's step: quantisers pass their input on."""

    def __init__(self, program: Program, exact: Program | None = None) -> None:
        """Take the program and, where its values have changed since, what it was before.

        Args:
            program: with quantisers; its weights may be rounded, its biases corrected.
            exact: the same before quantisers were placed, its transforms folded.
        """
        self._program = program
        self._exact = exact or program
        self._biases = {} if self._exact is program else _biases(self._exact)
        self._quantizers = {q.module for q in program.weight_quantizers}
        self._quantizers |= {q.module for q in program.activation_quantizers}

    def __call__(self, node: Node, environment: Environment) -> object:
        """The value of a node whose inputs are in `environment` or are parameters."""
        if node.op == "call_module" and node.target in self._quantizers:
            source = input_node(node)
            if source.op == "get_attr":
                return self._exact.parameter(str(source.target))
            return environment[source]
        exact = self._exact_bias(node)
        if exact is not None:
            return exact
        if node.op == "call_module" and isinstance(
            self._program.module.get_submodule(str(node.target)), MeanShift
        ):
            return self._unshifted(node, environment)
        instead = {
            x: bias for x in node.all_input_nodes
            if x.op == "get_attr" and (bias := self._exact_bias(x)) is not None
        }
        return run_node(self._program.module, node, environment | instead, None)

    def _exact_bias(self, node: Node) -> Tensor | None:
        """What a linear adds (N,) in the exact program, for the bias that a pass has given it."""
        owner = owner_of_bias(node)
        return None if owner is None else self._biases.get(owner)

    def _unshifted(self, node: Node, environment: Environment) -> object:
        """The bias (N,) behind a shift of the mean, zero where there is none."""
        _, rounded, *bias = node.args
        assert isinstance(rounded, Node)
        if not bias or not isinstance(bias[0], Node):
            weight = environment[rounded]
            return weight.new_zeros(weight.shape[0])
        known = environment.get(bias[0])
        return self._program.parameter(str(bias[0].target)) if known is None else known


def _biases(exact: Program) -> dict[str, Tensor]:
    """What each linear of a parameter adds (N,), by its node."""
    found = {}
    for node in exact.call_nodes(LINEAR):
        parameter = weight_end(exact, input_node(node, 1))
        if parameter is None:
            continue
        if len(node.args) > 2 and isinstance(node.args[2], Node):
            found[node.name] = transformed(exact, node.args[2])
        else:
            weight = exact.held(str(parameter.target))
            found[node.name] = weight.new_zeros(weight.shape[0], device=exact.device)
    return found
