"""Write the online Hadamards as reshapes and small matmuls on factors that all layers share.

A Hadamard of order 1,536 is two matmuls of order 48 and 32, never a dense 1,536 x 1,536 product,
and its factors stand in the file once for the whole model. What comes out has its channels in
another order, and the inputs of the linear behind it are put into the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor
from torch.fx import Node

from fptq_compiler.graph.edges import OnlineEdge, ReorderEdge, insert_edge, weight_end
from fptq_compiler.graph.inputs import input_node
from fptq_compiler.graph.pipeline import Pass, PassResult
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.surgery import (
    call,
    get_parameter,
    has_attribute,
    replace,
    set_parameter,
)
from fptq_compiler.passes.linears import is_linear
from fptq_compiler.transforms import Hadamard


def mix(x: Tensor, signs: Tensor | None, *factors: Tensor) -> Tensor:
    """Give x (..., n) times diag(signs) (1 ⊗ F1 ⊗ F2 …), the channels in the order of `mixed`.

    Every factor is multiplied on the last axis, where it is one plain matmul; the axes turn
    between two of them and are not turned back.
    """
    shape, width = x.shape, prod(f.shape[0] for f in factors)
    y = x if signs is None else x * signs
    for index, factor in enumerate(reversed(factors)):
        if index:
            y = y.transpose(1, 2)
        order = factor.shape[0]
        y = y.reshape(-1, width // order, order) @ factor
    return y.reshape(shape)


def mixed(size: int, orders: Sequence[int]) -> Tensor:
    """(size,): which channel of the product stands at each place of what `mix` gives."""
    index = torch.arange(size).reshape(-1, *orders)
    axes = list(range(1, len(orders) + 1))
    for _ in orders[1:]:
        axes = [axes[-1], *axes[:-1]]
    return index.permute(0, *axes).reshape(size)


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
            _reorder_readers(program, node, mixed(edge.transform.size, edge.transform.orders))
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


@torch.no_grad()
def _reorder_readers(program: Program, node: Node, order: Tensor) -> None:
    """Put the input channels of every linear behind `node` into this order.

    Where a map that is still trained stands on the weight, the order follows it on its own edge.
    """
    edge = ReorderEdge(order)
    for reader in list(node.users):
        assert is_linear(reader), f"{reader.name} reads an online map, expected a linear"
        weight = input_node(reader, 1)
        parameter = weight_end(program, weight)
        assert parameter is not None, f"the weight of {reader.name} is no parameter"
        name = str(parameter.target)
        if parameter is weight:
            set_parameter(program.module, name, edge(program.parameter(name)))
        else:
            insert_edge(program, f"edges.order.{name.replace('.', '_')}", name, edge)


def _shared(program: Program, before: Node, name: str, value: Tensor) -> Node:
    """A parameter of that name, made once; a Hartley factor of the same order gets its own."""
    value = value.to(torch.float32)
    while has_attribute(program.module, name) and not torch.equal(program.parameter(name), value):
        name = f"{name}_"
    if not has_attribute(program.module, name):
        set_parameter(program.module, name, value)
    return get_parameter(program.graph, before, name, value)


