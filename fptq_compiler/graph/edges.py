"""Transforms as graph nodes: the one `insert` and the one `fold` that serve every map.

A weight edge is a `call_module` node between a parameter and its reader. Its module applies one
map at one port. Several edges may follow each other on one parameter; folding evaluates them in
float64 and leaves the parameter alone, under its old name.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from fptq_compiler.graph.inputs import input_node
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.rows import Rows
from fptq_compiler.graph.surgery import add_module, call_module, set_parameter
from fptq_compiler.transforms import Map, Port, Side
from fptq_compiler.transforms import port as ports_module
from fptq_compiler.transforms.dense import shared_evaluation


class Edge(nn.Module):
    """What stands between a parameter and its readers until it is folded.

    Attributes:
        side: which side of the parameter it multiplies; None is neither, and it commutes with
            no other edge.
    """

    side: Side | None

    @property
    def by_rows(self) -> bool:
        """Whether it acts on each row of a weight alone, and on all alike."""
        return self.side in (Side.IN, Side.TABLE)

    def waits_for(self, other: Edge) -> bool:
        """Whether it may not be applied before one in front of it."""
        return self.side is None or other.side is None or self.side is other.side


class WeightEdge(Edge):
    """Applies a map at a port: weight (as in the checkpoint) -> weight of the same shape."""

    def __init__(self, transform: Map, port: Port) -> None:
        super().__init__()
        self.transform = transform
        self.port = port
        self.side = port.side

    def forward(self, weight: Tensor) -> Tensor:
        """The transformed weight."""
        return ports_module.apply(self.transform, self.port, weight)

    def inputs(self, x: Tensor) -> Tensor:
        """What the weight reads of an input (..., in), for an edge on the side IN."""
        assert self.side is Side.IN
        assert not self.port.inverse_transpose
        return self.transform.right(x, self.port.repeat)

    def inputs_before(self, x: Tensor) -> Tensor:
        """The input (..., in) of which the weight reads x."""
        assert self.side is Side.IN
        assert not self.port.inverse_transpose
        return self.transform.right_inverse(x, self.port.repeat)


class GainEdge(Edge):
    """Takes in a norm's gain: W' = W diag(gain), for W (out, in) and gain (in,)."""

    side = Side.IN

    def __init__(self, gain: Tensor) -> None:
        super().__init__()
        self.register_buffer("gain", gain.detach())

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that reads the norm without its gain."""
        gain = self.get_buffer("gain")
        return weight * gain.to(weight.dtype)


class ShiftEdge(Edge):
    """Takes in a norm's bias β: b' = b + W β, for a linear's bias b (out,) and its W β."""

    side = Side.OUT

    def __init__(self, shift: Tensor) -> None:
        """Take W β, float64."""
        super().__init__()
        self.register_buffer("shift", shift.detach())

    def forward(self, bias: Tensor) -> Tensor:
        """The bias of the linear that reads the norm without its own."""
        return bias + self.get_buffer("shift").to(bias.dtype)


class CenterEdge(Edge):
    """Takes out the mean over the channels, for a parameter that writes the residual stream."""

    def __init__(self, side: Side) -> None:
        """Take where the channels stand: OUT of (out, in) or (out,), or TABLE (…, d)."""
        super().__init__()
        self.side = side

    def forward(self, weight: Tensor) -> Tensor:
        """The parameter that writes values of mean zero."""
        axis = 0 if self.side is Side.OUT else -1
        return weight - weight.mean(axis, keepdim=True)


class ReorderEdge(Edge):
    """Puts the input channels of a weight (out, in) into another order."""

    side = Side.IN

    def __init__(self, order: Tensor) -> None:
        """Take by new place the old channel, (in,) int64."""
        super().__init__()
        self.register_buffer("order", order)

    def inputs(self, x: Tensor) -> Tensor:
        """What the weight reads of an input (..., in), in that order."""
        return x.index_select(-1, self.get_buffer("order").to(x.device))

    def inputs_before(self, x: Tensor) -> Tensor:
        """The input (..., in) of which the weight reads x."""
        return x.index_select(-1, self.get_buffer("order").to(x.device).argsort())

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that reads its input in that order."""
        found: Tensor = _Reorder.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
            weight, self.get_buffer("order").to(weight.device)
        )
        return found


class _Reorder(torch.autograd.Function):
    """`weight[:, order]` of a permutation, whose gradient is one too: an index sums in general."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return weight.index_select(1, order)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return gradients[0].index_select(1, order.argsort()), None


class LowRankEdge(Edge):
    """Adds a trained correction of low rank: W + A B, A (out, r) and B (r, in)."""

    side = None

    def __init__(self, shape: torch.Size, rank: int, generator: torch.Generator) -> None:
        """Draw A from N(0, 1 / r); B is zero, so that the weight is as it was."""
        super().__init__()
        rows, columns = shape
        self.left = nn.Parameter(torch.randn(rows, rank, generator=generator) / rank**0.5)
        self.right = nn.Parameter(torch.zeros(rank, columns))

    def forward(self, weight: Tensor) -> Tensor:
        """The corrected weight."""
        return weight + self.left.to(weight.dtype) @ self.right.to(weight.dtype)


class DeltaEdge(Edge):
    """Adds a trained correction of full rank: W + D, D (out, in), zero at first."""

    side = None

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(shape))

    def forward(self, weight: Tensor) -> Tensor:
        """The corrected weight."""
        return weight + self.delta.to(weight.dtype)


class OnlineEdge(nn.Module):
    """Applies a map to an activation (..., n) at run time, through its factors."""

    def __init__(self, transform: Map) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, x: Tensor) -> Tensor:
        """Give x M."""
        return self.transform.right(x)


def insert_map(program: Program, name: str, transform: Map, ports: Sequence[Port]) -> None:
    """Put one map on the edges of all its parameters.

    Args:
        program: rewritten in place; the map is reached as `program.map(name)`.
        name: unique, for example `value.model.layers.0.self_attn`.
        transform: the map, shared by all ports.
        ports: which parameters, on which side.

    Raises:
        ValueError: a port names a parameter that the graph does not read.
    """
    for index, port in enumerate(ports):
        path = f"edges.{name.replace('.', '_')}.{index}"
        insert_edge(program, path, port.parameter, WeightEdge(transform, port))
    program.maps[name] = transform


def insert_edge(program: Program, path: str, parameter: str, edge: Edge) -> None:
    """Put one edge behind all others on a parameter; every reader sees it.

    Raises:
        ValueError: no node reads the parameter.
    """
    ends = _edge_ends(program, parameter)
    if not ends:
        message = f"edge {path}: no node reads the parameter {parameter}"
        raise ValueError(message)
    add_module(program.module, path, edge)
    for end in ends:
        users = list(end.users)
        node = call_module(program.graph, users[0], path, (end,), like=end)
        for user in users:
            user.replace_input_with(end, node)


def insert_online(
    program: Program, name: str, transform: Map, *readers: Node, position: int = 0
) -> Node:
    """Put a map on one argument of `readers`, which read one value there; computed at run time."""
    source = input_node(readers[0], position)
    path = f"online.{name.replace('.', '_')}"
    add_module(program.module, path, OnlineEdge(transform))
    edge = call_module(program.graph, min(readers), path, (source,), like=source)
    for reader in readers:
        reader.update_arg(position, edge)
    return edge


def take_out(program: Program, names: Collection[str]) -> None:
    """Take maps out of the graph again; what else stands on their parameters stays."""
    maps = {program.maps.pop(name) for name in names}
    for node in list(program.graph.nodes):
        if node.op == "call_module":
            edge = program.module.get_submodule(str(node.target))
            if isinstance(edge, (WeightEdge, OnlineEdge)) and edge.transform in maps:
                node.replace_all_uses_with(input_node(node))
                program.graph.erase_node(node)


def online_map(program: Program, node: Node) -> Map | None:
    """The map that the node computes at run time; None where it is no such node."""
    if node.op != "call_module":
        return None
    edge = program.module.get_submodule(str(node.target))
    return edge.transform if isinstance(edge, OnlineEdge) else None


def is_online(program: Program, node: Node) -> bool:
    """Whether the node is a map that is computed at run time."""
    return online_map(program, node) is not None


def _is_edge(program: Program, node: Node) -> bool:
    if node.op != "call_module":
        return False
    return isinstance(program.module.get_submodule(str(node.target)), Edge)


def _edge_ends(program: Program, parameter: str) -> list[Node]:
    """The last node of each edge chain that starts at the parameter and is read by others."""
    ends = []
    for node in program.graph.nodes:
        if node.op == "get_attr" and node.target == parameter:
            end = node
            while True:
                following = [u for u in end.users if _is_edge(program, u)]
                if not following:
                    break
                end = following[0]
            if end.users:
                ends.append(end)
    return ends


def chains(program: Program) -> dict[str, list[Edge]]:
    """For every parameter with edges, its edges from the parameter outwards."""
    found: dict[str, list[Edge]] = {}
    for node in program.graph.nodes:
        if node.op == "get_attr" and (edges := edges_behind(program, node)):
            found[str(node.target)] = edges
    return found


def edges_behind(program: Program, node: Node) -> list[Edge]:
    """The edges of a parameter's node, from the parameter outwards."""
    edges: list[Edge] = []
    following: list[Node] = [node]
    while following := [u for u in following[0].users if _is_edge(program, u)]:
        edge = program.module.get_submodule(str(following[0].target))
        assert isinstance(edge, Edge)
        edges.append(edge)
    return edges


def weight_end(program: Program, node: Node) -> Node | None:
    """The parameter behind a chain of edges, or None where something else stands there."""
    while _is_edge(program, node):
        node = input_node(node)
    return node if node.op == "get_attr" else None


def _folded(weight: Tensor, edges: Sequence[Edge]) -> Tensor:
    """What the edges make of a weight in float64, a few rows at a time where that can be."""
    if weight.dim() == 2 and all(edge.by_rows for edge in edges):
        rows = Rows(weight, torch.float64)
        for edge in edges:
            rows = rows.through(edge)
        return torch.cat([piece.to(weight.dtype) for piece in rows.pieces()])
    value = weight.double()
    for edge in edges:
        value = edge(value)
    return value.to(weight.dtype)


def split(edges: Sequence[Edge], trained: Collection[nn.Module]) -> tuple[list[Edge], list[Edge]]:
    """Edges that can be applied once, and those that wait until the `trained` ones are settled.

    Maps on the two sides of a weight commute, so of the edges behind a trained one only those
    on its own side have to wait for it, and corrections, which are on neither.

    Args:
        edges: from the parameter outwards.
        trained: maps, and edges with parameters of their own.
    """
    constant: list[Edge] = []
    moving: list[Edge] = []
    for edge in edges:
        mine = edge in trained or (isinstance(edge, WeightEdge) and edge.transform in trained)
        if mine or any(edge.waits_for(m) for m in moving):
            moving.append(edge)
        else:
            constant.append(edge)
    return constant, moving


def fold(program: Program, trained: Collection[nn.Module] = ()) -> int:
    """Evaluate chains of edges in float64 and put the results in the parameters' places.

    Args:
        program: rewritten in place.
        trained: maps and edges that stay, and with them what cannot be merged before them.

    Returns:
        How many parameters changed.
    """
    merged: set[Edge] = set()
    plan = {name: split(edges, trained)[0] for name, edges in chains(program).items()}
    with torch.no_grad(), shared_evaluation(program.module, torch.float64):
        for name, edges in plan.items():
            if edges:
                set_parameter(program.module, name, _folded(program.parameter(name), edges))
                merged.update(edges)
    for node in list(program.graph.nodes):
        if _is_edge(program, node) and program.module.get_submodule(str(node.target)) in merged:
            node.replace_all_uses_with(input_node(node))
            program.graph.erase_node(node)
    return sum(bool(edges) for edges in plan.values())


def transformed(program: Program, end: Node) -> Tensor:
    """A parameter behind the chain of edges that ends at a node, differentiable."""
    if _is_edge(program, end):
        edge: Tensor = program.module.get_submodule(str(end.target))(
            transformed(program, input_node(end))
        )
        return edge
    return program.parameter(str(end.target))
