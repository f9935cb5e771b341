"""S_n: carry the normalised residual, and scale every branch by the same per-token factor.

    r_n² = d / (Σ Z̃_n² + e_{n-1})               S_n = S_{n-1} r_n     Ẑ_n = r_n Z̃_n
    Z̃_{n+1} = Ẑ_n + S_n F_n(Ẑ_n)                                       (arXiv 2506.04985)

where e_n = ε d S_n² is carried along as e_n = e_{n-1} r_n², and d is the width. Every norm
becomes r_n and its product with the stream, which also replaces the stream in the addition. S_n
multiplies the branch at the input of its last linear (so that the quantiser there sees the calm
tensor), or at its output where `places` leaves that linear out or something stands behind it. The
bias of that linear is scaled too: the linear loses it and S_n b is added. All in float32 at least.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from fptq_compiler.graph import ops
from fptq_compiler.graph.inputs import input_node
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
        at_input = self._at_input(program, nodes)
        added = {b.add: nodes[b.value] for b in site.branches}
        S: _Scale | None = None
        for name in site.stream:
            node = nodes[name]
            if S is not None and name in added:
                _scale_branch(added[name], node, S.factor, at_input)
            elif S is not None:
                S = S.viewed(node)
            norms = [n for n in map(nodes.__getitem__, site.norms) if n.args[0] is node]
            if norms:
                S = _normalize(node, norms, S)
        program.scaled = True
        return PassResult(len(site.norms))

    def _at_input(self, program: Program, nodes: dict[str, Node]) -> dict[Node, bool]:
        """For each linear that writes the stream, whether S_n goes to its input."""
        site = program.sites.residual
        assert site is not None
        attention = {s.o.node for s in program.sites.attention if s.o is not None}
        return {
            nodes[w.node]: ("o_proj" if w.node in attention else "down_proj") in self.places
            for w in site.writers
        }


@dataclass(frozen=True)
class _Scale:
    """S_n and e_n = ε d S_n², each (B, S, 1)."""

    factor: Node
    error: Node

    def viewed(self, view: Node) -> _Scale:
        """The same behind a view of the stream that moves tokens."""
        sizes = view.args[1]
        assert isinstance(sizes, (list, tuple))
        sizes = [*sizes[:-1], 1]
        moved = [
            call(view.graph, view, aten.reshape.default, (n, sizes), like=None)
            for n in (self.factor, self.error)
        ]
        return _Scale(*moved)


def _normalize(stream: Node, norms: Sequence[Node], previous: _Scale | None) -> _Scale:
    """Ẑ_n in place of `norms` and of the stream, and what the next station needs."""
    graph, epsilon = stream.graph, norms[0].args[2]
    width = int(stream.meta["val"].shape[-1])
    first = min(r for r in stream.users if r.target is not aten.sym_size.int)
    assert isinstance(epsilon, float)

    def emit(target: Callable[..., object], *args: object) -> Node:
        return call(graph, first, target, args, like=None)

    total = emit(ops.sum_of_squares, stream)
    error = epsilon * width if previous is None else previous.error
    inverse = emit(aten.reciprocal.default, emit(aten.add.Tensor, total, error))
    square = emit(aten.mul.Tensor, inverse, float(width))
    r = emit(aten.sqrt.default, square)
    factor = r if previous is None else emit(aten.mul.Tensor, previous.factor, r)
    following = emit(aten.mul.Tensor, square, error)
    normalized = call(graph, first, aten.mul.Tensor, (stream, r), like=stream)
    for norm in norms:
        replace(norm, normalized)
    for reader in list(stream.users):
        if reader.target is not aten.sym_size.int and reader not in (total, normalized):
            reader.replace_input_with(stream, normalized)
    return _Scale(factor, following)


def _scale_branch(value: Node, addition: Node, S: Node, at_input: dict[Node, bool]) -> None:
    """S_n F_n: each linear that writes is scaled at its input or output, else their sum."""
    leaves = _leaves(value)
    if all(leaf in at_input and leaf > S and _on_tokens(leaf, addition) for leaf in leaves):
        for leaf in leaves:
            if at_input[leaf]:
                _scale_input(leaf, S)
            else:
                _multiply(leaf, leaf.next, list(leaf.users), S)
    else:
        _multiply(value, addition, [addition], S)


def _leaves(value: Node) -> list[Node]:
    """The terms of a sum, without the numbers that they are multiplied by."""
    if len(value.users) == 1 and value.target is aten.add.Tensor and not value.kwargs:
        terms = [x for x in value.args if isinstance(x, Node)]
        return [leaf for x in terms for leaf in _leaves(x)]
    if value.target is aten.mul.Tensor and isinstance(value.args[1], (int, float)):
        source = input_node(value)
        return _leaves(source)
    return [value]


def _on_tokens(linear: Node, addition: Node) -> bool:
    """Whether a linear with one reader reads a row for every token of the stream."""
    source = input_node(linear)
    rows, tokens = (n.meta["val"].shape[:-1] for n in (source, addition))
    return len(linear.users) == 1 and str(tuple(rows)) == str(tuple(tokens))


def _scale_input(writer: Node, S: Node) -> None:
    """(S x) W + S b: the linear without its bias on scaled inputs."""
    source, weight = writer.args[0], writer.args[1]
    bias = writer.args[2] if len(writer.args) > 2 else None
    assert isinstance(source, Node)
    scaled = call(writer.graph, writer, aten.mul.Tensor, (source, S), like=source)
    writer.args = (scaled, weight)
    if bias is None:
        return
    readers, following = list(writer.users), writer.next
    shift = call(writer.graph, following, aten.mul.Tensor, (S, bias), like=None)
    total = call(writer.graph, following, aten.add.Tensor, (writer, shift), like=writer)
    for reader in readers:
        reader.replace_input_with(writer, total)


def _multiply(value: Node, before: Node, readers: Sequence[Node], S: Node) -> None:
    """`readers` read S times the value."""
    product = call(value.graph, before, aten.mul.Tensor, (value, S), like=value)
    for reader in readers:
        reader.replace_input_with(value, product)
