"""Write the online maps as reshapes and small matmuls, on factors that all layers share.

A Hadamard of order 1,536 is two matmuls of order 48 and 32, never a dense 1,536 x 1,536 product,
and its factors stand in the file once for the whole model. What comes out has its channels in
another order, and the inputs of the linear behind it are put into the same; queries and keys have
the same order already. A scale of each channel of a norm that nothing else reads becomes the
norm's gain.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor
from torch.fx import Node

from fptq_compiler.graph import ops
from fptq_compiler.graph.edges import ReorderEdge, insert_edge, online_map, weight_end
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
from fptq_compiler.transforms import Factored, Map, factored
from fptq_compiler.transforms.factored import order


def mix(x: Tensor, scale: Tensor | None, *factors: Tensor | int) -> Tensor:
    """Give x (..., n) times diag(scale) (1 ⊗ F1 ⊗ F2 …), the channels in the order of `mixed`.

    Every factor is multiplied on the last axis, where it is one plain matmul; the axes turn
    between two of them and are not turned back. A number stands for an identity of that order.
    """
    shape, width = x.shape, prod(order(f) for f in factors)
    y = x if scale is None else x * scale
    for index, factor in enumerate(reversed(factors)):
        if index:
            y = y.transpose(1, 2)
        y = y.reshape(-1, width // order(factor), order(factor))
        y = y if isinstance(factor, int) else y @ factor
    return y.reshape(shape)


def mixed(size: int, orders: Sequence[int]) -> Tensor:
    """(size,): which channel of the product stands at each place of what `mix` gives."""
    index = torch.arange(size).reshape(-1, *orders)
    axes = list(range(1, len(orders) + 1))
    for _ in orders[1:]:
        axes = [axes[-1], *axes[:-1]]
    return index.permute(0, *axes).reshape(size)


def online_operations(program: Program) -> int:
    """Multiply-adds a token of everything that `mix` computes."""
    total = 0
    for node in program.call_nodes(mix):
        shape = input_node(node).meta["val"].shape
        channels = int(shape[-1]) * (int(shape[1]) if len(shape) == 4 else 1)
        scale, *factors = node.args[1:]
        orders = [f.meta["val"].shape[0] for f in factors if isinstance(f, Node)]
        total += channels * (sum(orders) + (scale is not None))
    return total


class FreezeOnline(Pass):
    """Replace online edges by their arithmetic on shared parameters."""

    requires = ("folded",)
    provides = ("online_frozen",)
    rounds = True

    def run(self, program: Program) -> PassResult:
        """Rewrite every online edge."""
        changed = 0
        for node in list(program.graph.nodes):
            transform = online_map(program, node)
            if transform is None:
                continue
            form = factored(transform)
            if not form.factors and _is_ungained_norm(input_node(node)):
                _freeze_gain(program, node, form)
            else:
                _reorder_readers(program, node, mixed(transform.size, form.orders))
                _freeze(program, node, transform, form)
            changed += 1
        return PassResult(changed)


def _is_ungained_norm(source: Node) -> bool:
    """Whether a norm without gain has one reader."""
    return source.target is ops.rms_norm and source.args[1] is None and len(source.users) == 1


def _freeze_gain(program: Program, node: Node, form: Factored) -> None:
    """The scale becomes the gain of the norm that the node reads."""
    norm = input_node(node)
    assert form.scale is not None
    norm.update_arg(1, _shared(program, norm, f"online.gain_{node.name}", form.scale))
    replace(node, norm)


def _freeze(program: Program, node: Node, transform: Map, form: Factored) -> None:
    learned = transform.has_parameters
    factors: list[Node | int] = []
    for index, factor in enumerate(form.factors):
        if isinstance(factor, int):
            factors.append(factor)
            continue
        name = f"factor_{index}_{node.name}" if learned else f"hadamard_{order(factor)}"
        factors.append(_shared(program, node, f"online.{name}", factor))
    scale = None
    if form.scale is not None:
        scale = _shared(program, node, f"online.scale_{node.name}", form.scale)
    replace(node, call(program.graph, node, mix, (node.args[0], scale, *factors), like=node))


@torch.no_grad()
def _reorder_readers(program: Program, node: Node, places: Tensor) -> None:
    """Put the input channels of every linear behind `node` in these places.

    Where a map that is still trained stands on the weight, they follow it on an edge of their own.
    Attention needs nothing: its queries and keys go through one map, and their products add up.
    """
    edge = ReorderEdge(places)
    for reader in list(node.users):
        if reader.target is ops.attention and node in reader.args[:2]:
            continue
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


