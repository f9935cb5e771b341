"""Write complex numbers as pairs of real ones, which ONNX has.

    view_as_real(view_as_complex(x) * table)    (a c - b d, a d + b c) of pairs (..., 2)

A complex value (...) has a twin (..., 2). Where one operator has no real form here, all stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from fptq_compiler.graph.inputs import input_node
from fptq_compiler.graph.pipeline import Pass, PassResult
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.shaped import shaped_call
from fptq_compiler.graph.surgery import get_parameter, replace, set_parameter

aten = torch.ops.aten
ON_AN_AXIS = (aten.slice.Tensor, aten.select.int, aten.unsqueeze.default, aten.squeeze.dim)
IN_A_SHAPE = (aten.view.default, aten.reshape.default, aten.expand.default)
READERS = (aten.view_as_real.default, aten.real.default, aten.imag.default)
Make = Callable[..., Node]


class RealNumbers(Pass):
    """Replace every complex value by its twin."""

    requires = ("canonical",)

    def run(self, program: Program) -> PassResult:
        """Rewrite the whole graph, or nothing."""
        nodes = list(program.graph.nodes)
        numbers = [n for n in nodes if _is_complex(n)]
        readers = [n for n in nodes if n.target in READERS]
        known = {*numbers, *readers}
        supported = all(n.op == "get_attr" or n.target in FORMS for n in numbers)
        if not supported or any(r not in known for n in numbers for r in n.users):
            return PassResult(0)
        twins: dict[Node, Node] = {}
        for node in (n for n in nodes if n in known):
            if node in readers:
                replace(node, _read(node, twins))
            elif node.op == "get_attr":
                twins[node] = _stored(program, node)
            else:
                twins[node] = FORMS[node.target](node, twins, _maker(node))
        return PassResult(len(known))


def _is_complex(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_complex()


def _maker(node: Node) -> Make:
    def make(target: Any, *arguments: Any) -> Node:
        return shaped_call(node.graph, node, target, arguments, like=node)

    return make


def _stored(program: Program, node: Node) -> Node:
    """The table under its name, as pairs."""
    name = str(node.target)
    value = program.parameter(name)
    pairs = torch.view_as_real(value).contiguous() if value.is_complex() else value
    set_parameter(program.module, name, pairs)
    return get_parameter(node.graph, node, name, pairs)


def _read(node: Node, twins: dict[Node, Node]) -> Node:
    twin = twins[node.all_input_nodes[0]]
    if node.target is aten.view_as_real.default:
        return twin
    part = 0 if node.target is aten.real.default else 1
    return _maker(node)(aten.select.int, twin, -1, part)


def _source(node: Node, twins: dict[Node, Node]) -> tuple[Node, int]:
    """The twin of the first argument, and the rank of the complex value."""
    source = input_node(node)
    return twins[source], source.meta["val"].dim()


def _same(node: Node, twins: dict[Node, Node], make: Make) -> Node:
    found = input_node(node)
    return found


def _polar(node: Node, twins: dict[Node, Node], make: Make) -> Node:
    length, angle = node.args
    parts = [
        make(aten.mul.Tensor, make(turn, angle), length)
        for turn in (aten.cos.default, aten.sin.default)
    ]
    return make(aten.stack.default, parts, -1)


def _complex(node: Node, twins: dict[Node, Node], make: Make) -> Node:
    return make(aten.stack.default, list(node.args), -1)


def _product(node: Node, twins: dict[Node, Node], make: Make) -> Node:
    numbers = [twins[x] for x in node.args if isinstance(x, Node) and x in twins]
    if len(numbers) == 1:
        (factor,) = (x for x in node.args if not isinstance(x, Node) or x not in twins)
        if isinstance(factor, Node):
            factor = make(aten.unsqueeze.default, factor, -1)
        return make(aten.mul.Tensor, numbers[0], factor)
    (a, b), (c, d) = (
        [make(aten.select.int, twin, -1, part) for part in (0, 1)] for twin in numbers
    )

    def multiply(x: Node, y: Node) -> Node:
        return make(aten.mul.Tensor, x, y)

    parts = [
        make(aten.sub.Tensor, multiply(a, c), multiply(b, d)),
        make(aten.add.Tensor, multiply(a, d), multiply(b, c)),
    ]
    return make(aten.stack.default, parts, -1)


def _on_an_axis(node: Node, twins: dict[Node, Node], make: Make) -> Node:
    twin, rank = _source(node, twins)
    axis, *rest = node.args[1:] or (0,)
    assert isinstance(axis, int)
    places = rank + 1 if node.target is aten.unsqueeze.default else rank
    return make(node.target, twin, axis % places, *rest)


def _in_a_shape(node: Node, twins: dict[Node, Node], make: Make) -> Node:
    twin, _ = _source(node, twins)
    sizes = node.args[1]
    assert isinstance(sizes, (list, tuple))
    target = aten.reshape.default if node.target is aten.view.default else node.target
    return make(target, twin, [*sizes, 2])


def _exchanged(node: Node, twins: dict[Node, Node], make: Make) -> Node:
    twin, rank = _source(node, twins)
    axes = list(range(rank))
    if node.target is aten.transpose.int:
        first, second = node.args[1:]
        assert isinstance(first, int)
        assert isinstance(second, int)
        axes[first], axes[second] = axes[second], axes[first]
    else:
        axes = [axis % rank for axis in cast(Sequence[int], node.args[1])]
    return make(aten.permute.default, twin, [*axes, rank])


def _of_rows(node: Node, twins: dict[Node, Node], make: Make) -> Node:
    twin, _ = _source(node, twins)
    return make(node.target, twin, *node.args[1:])


FORMS: dict[Any, Callable[[Node, dict[Node, Node], Make], Node]] = {
    aten.view_as_complex.default: _same,
    aten.polar.default: _polar,
    aten.complex.default: _complex,
    aten.mul.Tensor: _product,
    aten.transpose.int: _exchanged,
    aten.permute.default: _exchanged,
    **dict.fromkeys(ON_AN_AXIS, _on_an_axis),
    **dict.fromkeys(IN_A_SHAPE, _in_a_shape),
    aten.index.Tensor: _of_rows,
}
