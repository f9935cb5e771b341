"""Carry a scaled stream's epsilon as one more channel, so that a norm needs the stream alone.

    before  r_n² = d / (Σ Z̃_n² + e_{n-1})        e_n = e_{n-1} r_n²,  e_0 = ε d
    after   Z̃' = [Z̃, sqrt(e)],  r'_n = 1 / rms(Z̃'_n) = r_n sqrt((d + 1) / d)

The channel starts as the constant sqrt(ε d) behind the embedding, every writer of the stream adds
zero to it, and every norm scales it with the others, which is just how e changes. Readers give it
no weight, and take the constant sqrt(d / (d + 1)) into theirs. A norm with its factor is then one
kernel, SimplifiedLayerNormalization, in place of eight small ones.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor
from torch.fx import Node

from fptq_compiler.graph import ops
from fptq_compiler.graph.patterns import Match, Op, Var, match
from fptq_compiler.graph.pipeline import Pass, PassResult
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.surgery import call, replace, set_parameter

aten = torch.ops.aten
MUL, ADD = (aten.mul.Tensor,), (aten.add.Tensor,)
SHIFTED = Op(ADD, (Op((ops.sum_of_squares,), (Var("stream"),)), Var("error")))
SQUARE = Op(MUL, (Op((aten.reciprocal.default,), (SHIFTED,)), Var("width")))
NORM = Op(MUL, (Var("stream"), Op((aten.sqrt.default,), (SQUARE,), "factor")), "normalized")


class CarryEpsilon(Pass):
    """Widen the stream of a scaled program by one channel; others, and odd ones, stay."""

    requires = ("folded",)
    provides = ("epsilon_carried",)
    rounds = True

    def run(self, program: Program) -> PassResult:
        """Rewrite every norm on the stream, and the weights around it."""
        found = [match(NORM, n) for n in program.call_nodes(aten.mul.Tensor)]
        norms = [_Norm.of(m) for m in found if isinstance(m, Match)]
        site = program.sites.residual
        if site is None or not norms or not _carries(norms):
            return PassResult(0)
        first = norms[0]
        epsilon = first.error
        assert isinstance(epsilon, float), f"{first.normalized.name}: no norm stands before it"
        width = int(first.stream.meta["val"].shape[-1])
        _widen_weights(program, width)
        stream = call(
            program.graph, first.factor, aten.constant_pad_nd.default,
            (first.stream, [0, 1], sqrt(epsilon)), like=first.stream,
        )
        _widen_value(stream, width)
        for norm in norms:
            _widen_branch(norm.stream, width, stop=first.stream)
            _rewrite(norm, stream if norm is first else norm.stream, width)
        return PassResult(len(norms))


@dataclass(frozen=True)
class _Norm:
    """A norm of `passes.scale_residual`: Ẑ = r Z̃, with r² = d / (Σ Z̃² + e)."""

    stream: Node
    error: Node | float
    factor: Node
    normalized: Node

    @classmethod
    def of(cls, found: Match) -> _Norm:
        """Read the bindings of `NORM`."""
        return cls(found["stream"], found["error"], found["factor"], found["normalized"])


def _carries(norms: Sequence[_Norm]) -> bool:
    """Whether sums and products alone stand between writers, norms and readers."""
    width = norms[0].stream.meta["val"].shape[-1]
    readers = {r.target for n in norms for r in n.normalized.users}
    if not readers <= {aten.linear.default, *ADD}:
        return False
    seen = {norms[0].stream, *(n.normalized for n in norms)}
    frontier = [n.stream for n in norms[1:]]
    while frontier:
        node = frontier.pop()
        if node in seen or node.meta.get("val") is None or node.meta["val"].shape[-1] != width:
            continue
        seen.add(node)
        if node.target not in (*MUL, *ADD, aten.linear.default):
            return False
        if node.target is not aten.linear.default:
            frontier.extend(node.all_input_nodes)
    return True


def _rewrite(norm: _Norm, stream: Node, width: int) -> None:
    graph, before = stream.graph, norm.factor
    both = call(graph, before, ops.unit_rms, (stream,), like=None)
    normalized = call(graph, before, operator.getitem, (both, 0), like=norm.normalized)
    _widen_value(normalized, width)
    factor = call(graph, before, operator.getitem, (both, 1), like=norm.factor)
    replace(norm.normalized, normalized)
    norm.factor.replace_all_uses_with(factor)


def _widen_value(node: Node, width: int) -> None:
    """The record of a value (..., d) becomes (..., d + 1)."""
    value = node.meta["val"]
    node.meta["val"] = value.new_empty((*value.shape[:-1], width + 1))


def _widen_branch(node: Node, width: int, *, stop: Node) -> None:
    """The same for all that is as wide as the stream, from an addition back to its writer."""
    value = node.meta.get("val")
    if node is stop or not isinstance(value, Tensor) or value.shape[-1:] != (width,):
        return
    _widen_value(node, width)
    if node.target is not aten.linear.default:
        for source in node.all_input_nodes:
            _widen_branch(source, width, stop=stop)


@torch.no_grad()
def _widen_weights(program: Program, width: int) -> None:
    """Readers: zero for the new channel, and the constant. Writers and their biases: zero."""
    site = program.sites.residual
    assert site is not None
    constant = sqrt(width / (width + 1))
    for name in {reader.weight for reader in site.readers}:
        weight = program.parameter(name)
        _set(program, name, torch.nn.functional.pad(weight * constant, (0, 1)))
    for writer in site.writers:
        assert (writer.start, writer.stop) == (0, writer.features), f"{writer.node}: a slice"
    for name in {writer.weight for writer in site.writers}:
        _set(program, name, torch.nn.functional.pad(program.parameter(name), (0, 0, 0, 1)))
    for name in {writer.bias for writer in site.writers if writer.bias is not None}:
        _set(program, name, torch.nn.functional.pad(program.parameter(name), (0, 1)))


def _set(program: Program, name: str, value: Tensor) -> None:
    set_parameter(program.module, name, value)
    for node in program.graph.nodes:
        if node.op == "get_attr" and node.target == name:
            node.meta["val"] = torch.empty_like(value, device="meta")
