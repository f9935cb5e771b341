"""Give position 0 a static range of its own where calibration found it much wider.

The first token is a sink: a few linear inputs are hundreds of times larger there. A linear layer
is linear in every row, so row 0 may be multiplied by a static power of two c before the
quantiser and its result by 1 / c, without changing the function:

    x' = f x,  y = (x' W) / f + b,  f = c at position 0 and 1 elsewhere

The factor costs two products with a (S, 1) vector, at the few linears that need it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx import Node

from fptq_compiler.graph.pipeline import Effect, Pass, PassResult
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.surgery import call

aten = torch.ops.aten


class ProtectFirstPosition(Pass):
    """Rewrite around the quantisers that calibration names."""

    requires = ("quantizers_placed", "calibrated")
    provides = ("first_position_protected",)
    # The quantisers that stand here make the change invisible to a comparison with the
    # original; that the rewrite preserves the function is a test of its own.
    effect = Effect.APPROXIMATES

    def __init__(self, factors: Mapping[str, float]) -> None:
        self.factors = dict(factors)

    def run(self, program: Program) -> PassResult:
        """Multiply in front of each named quantiser, divide behind its readers."""
        if not self.factors or "first_position_protected" in program.facts:
            return PassResult(0)
        nodes = {n.name: n for n in program.graph.nodes}
        first = _first_position(program)
        for name, factor in self.factors.items():
            _protect(nodes[name], first, factor)
        return PassResult(len(self.factors))


def _first_position(program: Program) -> Node:
    """(S, 1) float: 1 at position 0, else 0; made once, behind the inputs."""
    inputs = [n for n in program.graph.nodes if n.op == "placeholder"]
    ids = inputs[program.ids_index]
    before = next(n for n in program.graph.nodes if n.op not in ("placeholder", "get_attr"))
    graph = program.graph
    size = call(graph, before, aten.sym_size.int, (ids, 1), like=None)
    positions = call(graph, before, aten.arange.default, (size,), like=None)
    is_first = call(graph, before, aten.eq.Scalar, (positions, 0), like=None)
    as_float = call(graph, before, aten.to.dtype, (is_first, torch.float32), like=None)
    return call(graph, before, aten.unsqueeze.default, (as_float, -1), like=None)


def _protect(quantizer: Node, first: Node, factor: float) -> None:
    graph = quantizer.graph
    source = quantizer.args[0]
    readers = list(quantizer.users)

    def blend(before: Node, value: float) -> Node:
        """1 everywhere, `value` at position 0."""
        scaled = call(graph, before, aten.mul.Tensor, (first, value - 1.0), like=None)
        return call(graph, before, aten.add.Tensor, (scaled, 1.0), like=None)

    assert isinstance(source, Node)
    multiplied = call(
        graph, quantizer, aten.mul.Tensor, (source, blend(quantizer, factor)), like=source
    )
    quantizer.args = (multiplied, *quantizer.args[1:])
    for reader in readers:
        bias = reader.args[2] if len(reader.args) > 2 else None
        reader.args = reader.args[:2]
        following = reader.next
        restored = call(
            graph, following, aten.mul.Tensor, (reader, blend(following, 1.0 / factor)),
            like=reader,
        )
        end = restored
        if bias is not None:
            end = call(graph, following, aten.add.Tensor, (restored, bias), like=reader)
        for user in list(reader.users):
            if user is not restored:
                user.replace_input_with(reader, end)
