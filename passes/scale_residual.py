"""S_n: carry the normalised residual, and scale every branch by the same per-token factor.

    r_n = 1 / sqrt(mean(Z̃_n²) + ε S_{n-1}²)     S_n = S_{n-1} r_n     Ẑ_n = r_n Z̃_n
    Z̃_{n+1} = Ẑ_n + S_n F_n(Ẑ_n)                                       (arXiv 2506.04985)

Every norm becomes r_n and its product with the stream, which also replaces the stream in the
addition. S_n multiplies the branch at the input of its last linear (so that the quantiser there
sees the calm tensor), or at its output where `places` leaves that linear out. The bias of that
linear is scaled too: the linear loses it and S_n b is added. All in float32 at least.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

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
        S: Node | None = None
        for branch in site.branches:
            norm, addition = nodes[branch.norm], nodes[branch.add]
            normalized, S = _normalize(stream, norm, S)
            place = "o_proj" if branch.writer.node in attention else "down_proj"
            scaled = _scale_branch(nodes[branch.writer.node], S, at_input=place in self.places)
            following = call(
                program.graph, addition, aten.add.Tensor, (normalized, scaled), like=addition,
                name=f"{branch.add}_scaled",
            )
            replace(addition, following)
            stream = following
        _normalize(stream, nodes[site.norms[-1]], S)
        program.scaled = True
        return PassResult(len(site.norms))


def _normalize(stream: Node, norm: Node, S: Node | None) -> tuple[Node, Node]:
    """Ẑ_n in place of `norm`, and S_n (B, S, 1)."""
    graph, epsilon = norm.graph, norm.args[2]

    def emit(target: object, *args: object) -> Node:
        return call(graph, norm, target, args, like=None)  # type: ignore[arg-type]

    square = emit(aten.mul.Tensor, stream, stream)
    mean = emit(aten.mean.dim, square, [-1], True)
    if S is None:
        shifted = emit(aten.add.Tensor, mean, epsilon)
    else:
        shift = emit(aten.mul.Tensor, emit(aten.mul.Tensor, S, S), epsilon)
        shifted = emit(aten.add.Tensor, mean, shift)
    r = emit(aten.rsqrt.default, shifted)
    following = r if S is None else emit(aten.mul.Tensor, S, r)
    normalized = call(graph, norm, aten.mul.Tensor, (stream, r), like=norm)
    replace(norm, normalized)
    return normalized, following


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

