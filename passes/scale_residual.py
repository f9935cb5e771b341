"""S_n: carry the normalised residual, and scale every branch by the same per-token factor.

    r_n² = d / (Σ Z̃_n² + e_{n-1})               S_n = S_{n-1} r_n     Ẑ_n = r_n Z̃_n
    Z̃_{n+1} = Ẑ_n + S_n F_n(Ẑ_n)                                       (arXiv 2506.04985)

where e_n = ε d S_n² is carried along as e_n = e_{n-1} r_n², and d is the width. Every norm
becomes r_n and its product with the stream, which also replaces the stream in the addition. S_n
multiplies the branch at the input of its last linear (so that the quantiser there sees the calm
tensor), or at its output where `places` leaves that linear out. The bias of that linear is scaled
too: the linear loses it and S_n b is added. All in float32 at least.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from fptq_compiler.graph import ops
from fptq_compiler.graph.pipeline import Pass, PassResult
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.surgery import call, replace

aten = torch.ops.aten


class ScaleResidual(Pass):
    """Rewrite the whole residual path; all norms on it must be without gain."""

    requires = ("norms_folded",)
    provides = ("scaled",)

    def __init__(self, places: Sequence[str] = ("down_proj", "o_proj")) -> None:
        self.places = tuple(places)

    def run(self, program: Program) -> PassResult:
        """Rewrite branch by branch, then the last norm."""
        site = program.sites.residual
        if site is None or "scaling" in site.refused or program.scaled:
            return PassResult(0)
        nodes = {n.name: n for n in program.graph.nodes}
        attention = {s.o.node for s in program.sites.attention if s.o is not None}
        stream = nodes[site.stream[0]]
        S: _Scale | None = None
        for branch in site.branches:
            norm, addition = nodes[branch.norm], nodes[branch.add]
            normalized, S = _normalize(stream, norm, S)
            place = "o_proj" if branch.writer.node in attention else "down_proj"
            writer = nodes[branch.writer.node]
            scaled = _scale_branch(writer, S.factor, at_input=place in self.places)
            following = call(
                program.graph, addition, aten.add.Tensor, (normalized, scaled), like=addition,
                name=f"{branch.add}_scaled",
            )
            replace(addition, following)
            stream = following
        _normalize(stream, nodes[site.norms[-1]], S)
        program.scaled = True
        return PassResult(len(site.norms))


@dataclass(frozen=True)
class _Scale:
    """S_n and e_n = ε d S_n², each (B, S, 1)."""

    factor: Node
    error: Node


def _normalize(stream: Node, norm: Node, previous: _Scale | None) -> tuple[Node, _Scale]:
    """Ẑ_n in place of `norm`, and what the next one needs."""
    graph, epsilon = norm.graph, norm.args[2]
    width = int(norm.meta["val"].shape[-1])
    assert isinstance(epsilon, float)

    def emit(target: object, *args: object) -> Node:
        return call(graph, norm, target, args, like=None)  # type: ignore[arg-type]

    total = emit(ops.sum_of_squares, stream)
    error = epsilon * width if previous is None else previous.error
    inverse = emit(aten.reciprocal.default, emit(aten.add.Tensor, total, error))
    square = emit(aten.mul.Tensor, inverse, float(width))
    r = emit(aten.sqrt.default, square)
    factor = r if previous is None else emit(aten.mul.Tensor, previous.factor, r)
    following = emit(aten.mul.Tensor, square, error)
    normalized = call(graph, norm, aten.mul.Tensor, (stream, r), like=norm)
    replace(norm, normalized)
    return normalized, _Scale(factor, following)


def _scale_branch(writer: Node, S: Node, *, at_input: bool) -> Node:
    """S_n F_n: scaled at the writer's input (its bias apart), or at its output."""
    graph = writer.graph
    if not at_input:
        with graph.inserting_after(writer):
            product = graph.call_function(aten.mul.Tensor, (writer, S))
        product.meta = dict(writer.meta)
        return product
    source, weight = writer.args[0], writer.args[1]
    bias = writer.args[2] if len(writer.args) > 2 else None
    assert isinstance(source, Node)
    scaled = call(graph, writer, aten.mul.Tensor, (source, S), like=source)
    writer.args = (scaled, weight)
    if bias is None:
        return writer
    with graph.inserting_after(writer):
        shift = graph.call_function(aten.mul.Tensor, (S, bias))
    with graph.inserting_after(shift):
        total = graph.call_function(aten.add.Tensor, (writer, shift))
    total.meta = dict(writer.meta)
    return total

