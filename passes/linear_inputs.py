"""The values that the linears of a site read, and one map put online in front of such linears."""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from fptq_compiler.graph.edges import insert_map, insert_online, online_map, weight_end
from fptq_compiler.graph.inputs import input_node
from fptq_compiler.graph.program import NearMiss, Program, source_line
from fptq_compiler.graph.sites import AttentionSite, LinearRef, MlpSite
from fptq_compiler.passes.linears import is_linear
from fptq_compiler.transforms import Map, Port, Side

Site = AttentionSite | MlpSite


def sites(program: Program) -> Iterator[Site]:
    """All attentions, then all MLPs."""
    yield from program.sites.attention
    yield from program.sites.mlp


def entering(program: Program, site: Site) -> list[Node]:
    """What the projections of a site read that stand at its beginning: q, k, v, or up and gate."""
    first = (site.q, site.k, site.v) if isinstance(site, AttentionSite) else (site.up, site.gate)
    return list(dict.fromkeys(_source(program, ref) for ref in first if ref is not None))


def readers(source: Node) -> list[Node]:
    """The linears that read a value."""
    return [n for n in source.users if is_linear(n) and n.args[0] is source]


def insert_before(program: Program, name: str, transform: Map, source: Node) -> None:
    """Put a map online in front of all linears that read `source`, its inverse in their weights.

    Layers that share their weights share the map, and each computes it online.
    """
    linears = readers(source)
    if name not in program.maps:
        weights = [weight_end(program, input_node(n, 1)) for n in linears]
        parameters = dict.fromkeys(str(w.target) for w in weights if w is not None)
        insert_map(program, name, transform, [Port(p, Side.IN, False) for p in parameters])
    insert_online(program, name, program.maps[name], *linears)


def is_inserted(program: Program, kind: str, source: Node) -> bool:
    """Whether a value is already what a map of this kind gives."""
    found = online_map(program, source)
    return any(m is found for n, m in program.maps.items() if n.partition(".")[0] == kind)


def refuse(program: Program, site: Site, transform: str, reason: str, node: Node) -> NearMiss:
    """Note in the site's record why a transform is not allowed there."""
    program.sites = program.sites.refusing(site, transform, reason)
    return NearMiss(transform, node.name, reason, source_line(node))


def _source(program: Program, ref: LinearRef) -> Node:
    return input_node(program.node(ref.node))
