"""Write the online Hadamards as reshapes and small matmuls on factors that all layers share.

A Hadamard of order 1,536 is two matmuls of order 48 and 32, never a dense 1,536 x 1,536 product,
and its factors stand in the file once for the whole model.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor
from torch.fx import Node

from fptq_compiler.graph.edges import OnlineEdge
from fptq_compiler.graph.pipeline import Pass, PassResult
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.surgery import (
    call,
    get_parameter,
    has_attribute,
    replace,
    set_parameter,
)
from fptq_compiler.transforms import Hadamard


def mix(x: Tensor, signs: Tensor | None, *factors: Tensor) -> Tensor:
    """Give x (..., n) times diag(signs) (1 ⊗ F1 ⊗ F2 …), each factor on its own axis."""
    shape = x.shape
    y = x if signs is None else x * signs
    after = prod(f.shape[0] for f in factors)
    for factor in factors:
        order = factor.shape[0]
        after //= order
        if after == 1:
            y = y.reshape(-1, order) @ factor
        else:
            y = factor.t() @ y.reshape(-1, order, after)
    return y.reshape(shape)


class FreezeOnline(Pass):
    """Replace online edges by their arithmetic on shared parameters."""

    requires = ("folded",)
    provides = ("online_frozen",)
    rounds = True

    def run(self, program: Program) -> PassResult:
        """Rewrite every online edge."""
        changed = 0
        for node in list(program.graph.nodes):
            if node.op != "call_module":
                continue
            edge = program.module.get_submodule(str(node.target))
            if not isinstance(edge, OnlineEdge) or not isinstance(edge.transform, Hadamard):
                continue
            _freeze(program, node, edge.transform)
            changed += 1
        return PassResult(changed)


def _freeze(program: Program, node: Node, transform: Hadamard) -> None:
    factors = [
        _shared(program, node, f"online.hadamard_{f.shape[0]}", f)
        for f in transform.factor_matrices()
    ]
    signs = None
    if not bool((transform.signs == 1).all()):
        signs = _shared(program, node, f"online.signs_{node.name}", transform.signs)
    replace(node, call(program.graph, node, mix, (node.args[0], signs, *factors), like=node))


def _shared(program: Program, before: Node, name: str, value: Tensor) -> Node:
    """A parameter of that name, made once; a Hartley factor of the same order gets its own."""
    value = value.to(torch.float32)
    while has_attribute(program.module, name) and not torch.equal(program.parameter(name), value):
        name = f"{name}_"
    if not has_attribute(program.module, name):
        set_parameter(program.module, name, value)
    return get_parameter(program.graph, before, name, value)


