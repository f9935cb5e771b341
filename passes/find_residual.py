"""Find the residual stream: from the embedding, through norms and additions, to the head.

An orthogonal map of the stream (T_r) and the per-token scale (S_n) hold only if every reader is
a norm in front of linear layers and every writer is a linear layer. What breaks this is named.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.fx import Node

from fptq_compiler.graph import ops
from fptq_compiler.graph.pipeline import Effect, Pass, PassResult
from fptq_compiler.graph.program import NearMiss, Program, source_line
from fptq_compiler.graph.sites import Branch, LinearRef, ResidualSite
from fptq_compiler.passes.linears import is_linear, linear_ref

aten = torch.ops.aten


class _BrokenStreamError(Exception):
    """The stream is not what the transforms need; carries the node."""

    def __init__(self, reason: str, node: Node) -> None:
        super().__init__(reason)
        self.node = node


class FindResidual(Pass):
    """Fill `program.sites.residual`, or say where the stream breaks."""

    requires = ("mlp_found",)
    provides = ("sites_found",)
    effect = Effect.ANALYSES

    def run(self, program: Program) -> PassResult:
        """Follow the stream from the embedding."""
        tables = [
            n for n in program.call_nodes(aten.embedding.default)
            if isinstance(n.args[0], Node) and n.args[0].op == "get_attr"
        ]
        if len(tables) != 1:
            reason = f"{len(tables)} embeddings, expected one"
            node = tables[0] if tables else next(iter(program.graph.nodes))
            return PassResult(0, (NearMiss("residual", node.name, reason, source_line(node)),))
        try:
            site = _follow(program, tables[0])
        except _BrokenStreamError as broken:
            miss = NearMiss("residual", broken.node.name, str(broken), source_line(broken.node))
            return PassResult(0, (miss,))
        program.sites = replace(program.sites, residual=site)
        return PassResult(0)


def _start(program: Program, embedding: Node) -> Node:
    """The embedding, or its product with one number (Gemma's sqrt(d)): a map commutes with it."""
    current = embedding
    while True:
        readers = [r for r in current.users if r.target is not aten.sym_size.int]
        if len(readers) != 1 or readers[0].target not in (aten.mul.Tensor, aten.div.Tensor):
            return current
        factor = readers[0].args[1]
        if isinstance(factor, Node) and (
            factor.op != "get_attr" or program.parameter(str(factor.target)).numel() != 1
        ):
            return current
        current = readers[0]


def _follow(program: Program, embedding: Node) -> ResidualSite:
    start = _start(program, embedding)
    stream: list[Node] = [start]
    norms: list[Node] = []
    branches: list[Branch] = []
    writers: list[LinearRef] = []
    readers: list[LinearRef] = []
    current: Node | None = start
    head: LinearRef | None = None
    while current is not None:
        following, norm = _readers_of(current)
        if norm is None:
            reason = f"the stream at {current.name} is read by no norm"
            raise _BrokenStreamError(reason, current)
        norms.append(norm)
        found = _linears_behind(program, norm, final=following is None)
        readers.extend(found)
        if following is None:
            if len(found) != 1:
                reason = f"{len(found)} linear layers read the last norm, expected the head"
                raise _BrokenStreamError(reason, norm)
            head = found[0]
            break
        writer_node = _other(following, current)
        ref = linear_ref(program, writer_node) if is_linear(writer_node) else None
        if ref is None:
            reason = f"{writer_node.name} adds to the stream and is not a linear layer"
            raise _BrokenStreamError(reason, writer_node)
        if len(writer_node.users) != 1:
            reason = f"the branch output {writer_node.name} has more than one reader"
            raise _BrokenStreamError(reason, writer_node)
        writers.append(ref)
        branches.append(Branch(current.name, norm.name, ref, following.name))
        stream.append(following)
        current = following
    assert head is not None
    table = embedding.args[0]
    assert isinstance(table, Node)
    head_weight = program.parameter(head.weight)
    table_weight = program.parameter(str(table.target))
    return ResidualSite(
        width=int(embedding.meta["val"].shape[-1]),
        table=str(table.target),
        embedding=embedding.name,
        stream=tuple(n.name for n in stream),
        norms=tuple(n.name for n in norms),
        readers=tuple(readers),
        writers=tuple(writers),
        branches=tuple(branches),
        head=head,
        tied=head_weight is table_weight or head_weight.data_ptr() == table_weight.data_ptr(),
    )


def _readers_of(current: Node) -> tuple[Node | None, Node | None]:
    """The addition that carries the stream on, and the norm that reads it."""
    additions, norms = [], []
    for reader in current.users:
        if reader.target is aten.add.Tensor:
            additions.append(reader)
        elif reader.target is ops.rms_norm:
            norms.append(reader)
        elif reader.target is not aten.sym_size.int:
            reason = f"{reader.name} ({reader.target}) reads the residual stream"
            raise _BrokenStreamError(reason, reader)
    if len(additions) > 1 or len(norms) > 1:
        reason = (
            f"{len(norms)} norms and {len(additions)} additions read the stream at "
            f"{current.name}, expected one of each"
        )
        raise _BrokenStreamError(reason, current)
    return (additions[0] if additions else None), (norms[0] if norms else None)


def _other(addition: Node, current: Node) -> Node:
    left, right = addition.args[0], addition.args[1]
    other = right if left is current else left
    if not isinstance(other, Node):
        reason = f"{addition.name} adds a constant to the stream"
        raise _BrokenStreamError(reason, addition)
    return other


def _linears_behind(program: Program, norm: Node, *, final: bool) -> list[LinearRef]:
    """The linears that read a norm; before the head tokens may be selected."""
    found: list[LinearRef] = []
    for reader in norm.users:
        source = reader
        while final and source.target in (aten.slice.Tensor, aten.index.Tensor) and (
            len(source.users) == 1 and source.args[1] != source.meta["val"].dim() - 1
        ):
            (source,) = source.users
        ref = linear_ref(program, source) if is_linear(source) else None
        if ref is None:
            reason = f"{source.name} ({source.target}) reads a norm and is not a linear layer"
            raise _BrokenStreamError(reason, source)
        found.append(ref)
    return found
