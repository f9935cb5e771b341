"""Where an operand of attention comes from: the value that is only moved, repeated or scaled.

Keys that are repeated for their group of queries, in whatever spelling, are a smaller tensor with
some of its axes exchanged; a factor may stand on the way. Both are found by giving the earlier
value numbers and looking at what the operand becomes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor
from torch.fx import Node

from fptq_compiler.graph import ops
from fptq_compiler.graph.evaluate import ancestors
from fptq_compiler.graph.probe import EXACT, Probe
from fptq_compiler.graph.shaped import shaped_call
from fptq_compiler.passes.linears import LINEAR

aten = torch.ops.aten
END = 2**63 - 1
LINEARS = (LINEAR, ops.linear)
BARRIERS = (*LINEARS, ops.attention, ops.rms_norm, aten.embedding.default)
UNMOVED = (0, 1, 2, 3)


@dataclass(frozen=True)
class Operand:
    """An operand (B, H, T, D) is `node`, its axes in `order`, heads repeated, times `factor`."""

    node: Node
    order: tuple[int, ...]
    heads: int
    factor: float

    def made(self, before: Node) -> Node:
        """The node (B, heads, T, D) in front of `before`."""
        if self.order == UNMOVED:
            return self.node
        arguments = (self.node, list(self.order))
        return shaped_call(
            before.graph, before, aten.permute.default, arguments, like=self.node
        )


def source_of(probe: Probe, operand: Node) -> Operand:
    """The value with the fewest heads that `operand` is; of those the earliest not permuted."""
    found = list(_sources(probe, operand))
    return min(found, key=lambda x: (x.heads, x.order != UNMOVED))


def _sources(probe: Probe, operand: Node) -> Iterator[Operand]:
    shape = probe.region.shape(operand)
    stop = [n for n in ancestors(operand) if n.target in BARRIERS]
    between = ancestors(operand, stop)
    known = _random_values(probe, [n for n in stop if not n.users.keys().isdisjoint(between)])
    for node in between:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.dim() != 4 or not value.is_floating_point():
            continue
        if node is not operand and _is_small(probe, node, shape):
            yield from _as_source(probe, node, operand, known)
    yield Operand(operand, UNMOVED, shape[1], 1.0)


def _is_small(probe: Probe, node: Node, shape: tuple[int, ...]) -> bool:
    """Whether the value may hold the operand: all its axes, with fewer heads or as many."""
    found = probe.region.shape(node)
    return any(
        (found[a], found[c], found[d]) == (shape[0], *shape[2:]) and shape[1] % found[b] == 0
        for a, b, c, d in permutations(range(4))
    )


def _random_values(probe: Probe, nodes: list[Node]) -> dict[Node, Tensor]:
    found = {}
    for index, node in enumerate(nodes):
        generator = torch.Generator().manual_seed(index)
        size = probe.region.shape(node)
        found[node] = torch.randn(size, generator=generator, dtype=torch.float64)
    return found


def _as_source(
    probe: Probe, node: Node, operand: Node, known: dict[Node, Tensor]
) -> Iterator[Operand]:
    shape = probe.region.shape(operand)
    generator = torch.Generator().manual_seed(9)
    size = probe.region.shape(node)
    values = torch.rand(size, generator=generator, dtype=torch.float64) + 0.5
    found = probe.region.value(operand, {**known, node: values})
    for order in (UNMOVED, *permutations(range(4))):
        moved = values.permute(order)
        if shape[1] % moved.shape[1] or moved.shape[::2] != found.shape[::2]:
            continue
        expected = moved.repeat_interleave(shape[1] // moved.shape[1], 1)
        if expected.shape != found.shape:
            continue
        factor = float(found.flatten()[0] / expected.flatten()[0])
        if (found - expected * factor).abs().max() <= EXACT * abs(factor):
            yield Operand(node, order, moved.shape[1], factor)
            return


def common_repeat(probe: Probe, operands: tuple[Node, Node]) -> int:
    """How often both operands (B, H, T, D) hold every head next to itself."""
    values = []
    for operand in operands:
        bound = _random_values(probe, linears(operand))
        values.append(probe.region.value(operand, bound))
    heads = values[0].shape[1]
    for repeat in range(heads, 1, -1):
        if heads % repeat == 0 and all(_is_repeated(x, repeat) for x in values):
            return repeat
    return 1


def _is_repeated(x: Tensor, repeat: int) -> bool:
    groups = x.reshape(x.shape[0], -1, repeat, *x.shape[2:])
    return bool(torch.equal(groups, groups[:, :, :1].expand_as(groups)))


def linears(operand: Node) -> list[Node]:
    """The linear layers that an operand comes from."""
    stop = [n for n in ancestors(operand) if n.target in LINEARS]
    between = set(ancestors(operand, stop))
    return [n for n in stop if n is operand or not n.users.keys().isdisjoint(between)]


def every(before: Node, x: Node, repeat: int) -> Node:
    """One head of each group of `repeat`."""
    return shaped_call(
        before.graph, before, aten.slice.Tensor, (x, 1, 0, END, repeat), like=x
    )
