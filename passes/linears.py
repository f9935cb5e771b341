"""What all site finders ask about linear layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from fptq_compiler.graph.program import Program
from fptq_compiler.graph.sites import LinearRef

aten = torch.ops.aten
LINEAR = aten.linear.default
# Operators that only move values: a linear behind them still reads the same channels.
MOVES = (
    aten.transpose.int,
    aten.permute.default,
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.slice.Tensor,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.select.int,
)


def is_linear(node: Node) -> bool:
    """Whether the node is a canonical linear layer."""
    return node.op == "call_function" and node.target is LINEAR


def weight_node(node: Node) -> Node:
    """The weight argument of a linear or embedding node (a parameter or an edge module)."""
    argument = node.args[0] if node.target is aten.embedding.default else node.args[1]
    assert isinstance(argument, Node)
    return argument


def linear_ref(
    program: Program, node: Node, start: int = 0, stop: int | None = None
) -> LinearRef | None:
    """The record of a linear whose weight and bias are parameters; None otherwise."""
    weight = weight_node(node)
    bias = node.args[2] if len(node.args) > 2 else None
    if weight.op != "get_attr" or (isinstance(bias, Node) and bias.op != "get_attr"):
        return None
    features = program.held(str(weight.target)).shape[0]
    return LinearRef(
        node=node.name,
        weight=str(weight.target),
        bias=str(bias.target) if isinstance(bias, Node) else None,
        start=start,
        stop=features if stop is None else stop,
        features=features,
    )


def parameter_readers(program: Program, parameter: Node) -> int:
    """How many nodes read the parameter of a `get_attr` node, through this node or another."""
    return sum(
        len(n.users)
        for n in program.graph.nodes if n.op == "get_attr" and n.target == parameter.target
    )


def nearest_linears(*starts: Node, stops: Sequence[object] = ()) -> list[Node]:
    """The linears reached backwards without passing another, or a node that calls a stop."""
    found: list[Node] = []
    stack, seen = list(starts), set()
    while stack:
        current = stack.pop()
        if current in seen or current.target in stops:
            continue
        seen.add(current)
        if is_linear(current):
            found.append(current)
        else:
            stack.extend(current.all_input_nodes)
    return found


def head_linears(program: Program) -> set[Node]:
    """The linears that make the model's output, behind moves and what acts on single logits."""
    found: set[Node] = set()
    (output,) = (n for n in program.graph.nodes if n.op == "output")
    for node in output.all_input_nodes:
        while not is_linear(node) and node.op == "call_function":
            sources = [x for x in node.all_input_nodes if x.op != "get_attr" and _is_float(x)]
            if len(sources) != 1 or not _acts_on_single_values(node):
                break
            (node,) = sources
        if is_linear(node):
            found.add(node)
    return found


def _is_float(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _acts_on_single_values(node: Node) -> bool:
    return node.target in MOVES or node.target is aten.to.dtype or (
        torch.Tag.pointwise in getattr(node.target, "tags", ())
    )


def forward_linear(source: Node) -> Node | None:
    """The one linear that reads `source` behind moves of values; None where there is no one."""
    current = source
    while True:
        readers = [r for r in current.users if r.target is not aten.sym_size.int]
        linears = [r for r in readers if is_linear(r) and r.args[0] is current]
        if linears:
            return linears[0] if len(linears) == 1 else None
        moves = [r for r in readers if r.target in MOVES]
        if len(moves) != 1:
            return None
        current = moves[0]


def site_name(weight: str | None, core: Node, projection: Node) -> str:
    """The module path that the user knows: of the output weight, else of a projection."""
    if weight is not None:
        return ".".join(weight.split(".")[:-2]) or core.name
    argument = projection.args[1] if is_linear(projection) else None
    if isinstance(argument, Node) and argument.op == "get_attr":
        return ".".join(str(argument.target).split(".")[:-2]) or core.name
    return core.name
