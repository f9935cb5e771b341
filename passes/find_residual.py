"""Find the residual stream: from the embeddings, through norms and additions, to the head.

An orthogonal map of the stream (T_r) holds if every value on it turns, every writer is a linear
or a table, and every reader a linear or a norm in front of linears. The per-token scale (S_n)
needs a chain: the stream is added to, and read through norms alone. What breaks either is named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from fptq_compiler.graph import ops
from fptq_compiler.graph.pipeline import Effect, Pass, PassResult
from fptq_compiler.graph.program import NearMiss, Program, source_line
from fptq_compiler.graph.sites import Branch, LinearRef, ResidualSite
from fptq_compiler.graph.stored import identity
from fptq_compiler.graph.stream import LAYER_NORM, BrokenStreamError, Stream, follow
from fptq_compiler.passes.linears import head_linears, linear_ref

aten = torch.ops.aten
VIEWS = (aten.view.default, aten.reshape.default)


class FindResidual(Pass):
    """Fill `program.sites.residual`, or say where the stream breaks."""

    requires = ("mlp_found",)
    provides = ("sites_found",)
    effect = Effect.ANALYSES

    def run(self, program: Program) -> PassResult:
        """Follow the stream from the first embedding."""
        tables = [
            n for n in program.call_nodes(aten.embedding.default)
            if isinstance(n.args[0], Node) and n.args[0].op == "get_attr"
        ]
        if not tables:
            node = next(iter(program.graph.nodes))
            miss = NearMiss("residual", node.name, "no embedding begins it", source_line(node))
            return PassResult(0, (miss,))
        try:
            site, misses = _site(program, tables[0])
        except BrokenStreamError as broken:
            return PassResult(0, (_miss("residual", broken),))
        program.sites = replace(program.sites, residual=site)
        return PassResult(0, tuple(misses))


def _site(program: Program, embedding: Node) -> tuple[ResidualSite, list[NearMiss]]:
    found = follow(program, embedding)
    head = _head(program, found)
    broken = {}
    for transform, check in (("residual", _check_turning), ("scaling", _check_reading)):
        try:
            check(found)
        except BrokenStreamError as error:
            broken[transform] = error
    chain = _Chain([embedding], [])
    try:
        chain = _chain(found, embedding)
    except BrokenStreamError as error:
        broken.setdefault("scaling", error)
    tables = [_parameter(t) for t in found.tables]
    site = ResidualSite(
        width=int(embedding.meta["val"].shape[-1]),
        tables=tuple(dict.fromkeys(tables)),
        stream=tuple(n.name for n in chain.nodes),
        norms=tuple(n.name for n in found.norms),
        readers=tuple(_refs(program, found.readers)),
        writers=tuple(_refs(program, found.writers)),
        branches=tuple(chain.branches),
        head=head,
        tied=any(_shared(program, head.weight, table) for table in tables),
        refused={transform: str(error) for transform, error in broken.items()},
    )
    return site, [_miss(transform, error) for transform, error in broken.items()]


def _head(program: Program, found: Stream) -> LinearRef:
    heads = head_linears(program) & set(found.readers)
    if len(heads) != 1:
        reason = f"{len(heads)} linear layers make the output from the stream, expected the head"
        raise BrokenStreamError(reason, found.norms[-1] if found.norms else found.tables[0])
    (head,) = _refs(program, list(heads))
    return head


def _refs(program: Program, linears: Sequence[Node]) -> list[LinearRef]:
    refs = []
    for node in linears:
        ref = linear_ref(program, node)
        if ref is None:
            reason = f"the weight of {node.name} is not a parameter"
            raise BrokenStreamError(reason, node)
        refs.append(ref)
    return refs


def _parameter(table: Node) -> str:
    source = table if table.op == "get_attr" else table.args[0]
    if not isinstance(source, Node) or source.op != "get_attr":
        reason = f"the table of {table.name} is not a parameter"
        raise BrokenStreamError(reason, table)
    return str(source.target)


def _shared(program: Program, first: str, second: str) -> bool:
    return identity(program.held(first)) == identity(program.held(second))


def _check_turning(found: Stream) -> None:
    """T_r: no gain on the way from a writer, and what LayerNorm takes out is missed by none."""
    if found.post_norms:
        norm = found.post_norms[0]
        reason = f"{norm.name} stands between a linear layer and the stream, and its gain stays"
        raise BrokenStreamError(reason, norm)
    _check_means(found)


def _check_reading(found: Stream) -> None:
    """S_n: whoever reads the stream reads it through a norm."""
    behind = _behind_norms(found)
    for reader in found.readers:
        if reader.args[0] not in behind:
            reason = f"{reader.name} reads the stream without a norm"
            raise BrokenStreamError(reason, reader)
    for reader in found.unturned:
        reason = f"{reader.name} ({reader.target}) reads the length of the stream"
        raise BrokenStreamError(reason, reader)
    _check_means(found)
    epsilons = {_epsilon(n) for n in found.norms}
    if len(epsilons) > 1:
        reason = f"its norms have epsilons {sorted(epsilons)}, expected one"
        raise BrokenStreamError(reason, found.norms[-1])


def _check_means(found: Stream) -> None:
    """A LayerNorm becomes an RMSNorm where the stream's mean is taken out at its writers."""
    layer_norms = [n for n in found.norms if n.target is LAYER_NORM]
    if not layer_norms:
        return
    behind = _behind_norms(found)
    others = [n for n in found.norms if n.target is not LAYER_NORM] + found.unturned
    others += [n for n in found.readers if n.args[0] not in behind]
    others += found.post_norms
    if others:
        reason = (
            f"{layer_norms[0].name} is a LayerNorm and {others[0].name} "
            f"({others[0].target}) needs the stream's mean"
        )
        raise BrokenStreamError(reason, others[0])


def _behind_norms(found: Stream) -> set[Node]:
    """The values that turn and come from a norm's output through moves alone."""
    behind = set(found.norms)
    frontier = list(found.norms)
    while frontier:
        for reader in frontier.pop().users:
            if reader in found.turned and reader not in behind and reader not in found.writers:
                behind.add(reader)
                frontier.append(reader)
    return behind


def _epsilon(norm: Node) -> float:
    epsilon = norm.args[-1] if norm.target is ops.rms_norm else (*norm.args, 1e-5)[4]
    assert isinstance(epsilon, float)
    return epsilon


@dataclass(frozen=True)
class _Chain:
    """The nodes that carry the stream, one after another, and what is added behind a norm."""

    nodes: list[Node]
    branches: list[Branch]


def _chain(found: Stream, embedding: Node) -> _Chain:
    """Follow the stream from reader to reader, as long as one carries it on."""
    chain = _Chain([embedding], [])
    norms: tuple[str, ...] = ()
    last, current = embedding, embedding
    while True:
        own = tuple(n.name for n in found.norms if n.args[0] is current)
        if own:
            norms, last = own, current
        carriers = [r for r in current.users if r in found.turned and r.name not in own]
        if not carriers:
            return chain
        if len(carriers) > 1:
            reason = f"{carriers[0].name} and {carriers[1].name} both carry the stream on"
            raise BrokenStreamError(reason, carriers[1])
        (carrier,) = carriers
        if norms and carrier.target not in VIEWS:
            value = _added(carrier, current)
            chain.branches.append(Branch(last.name, norms, value.name, carrier.name))
        chain.nodes.append(carrier)
        current = carrier


def _added(carrier: Node, current: Node) -> Node:
    """What an addition of the plain kind adds to the stream."""
    others = [x for x in carrier.args[:2] if x is not current]
    plain = carrier.target is aten.add.Tensor and not carrier.kwargs and len(others) == 1
    if not plain or not isinstance(others[0], Node):
        reason = f"{carrier.name} ({carrier.target}) carries the stream on and is no addition"
        raise BrokenStreamError(reason, carrier)
    value = others[0]
    if value.meta["val"].dim() != current.meta["val"].dim():
        reason = f"{value.name} is added to all tokens of the stream alike"
        raise BrokenStreamError(reason, value)
    return value


def _miss(transform: str, broken: BrokenStreamError) -> NearMiss:
    return NearMiss(transform, broken.node.name, str(broken), source_line(broken.node))
