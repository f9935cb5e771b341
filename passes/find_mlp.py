"""Find the MLP sites: every linear behind an activation that itself reads linear layers.

Which projection is "up" is not read from names or order. A projection is up when scaling its
output channels scales the input of the down projection alike, whatever the gate does: that is
evaluated, with random positive scales.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.fx import Node

from fptq_compiler.graph import ops
from fptq_compiler.graph.inputs import input_node
from fptq_compiler.graph.pipeline import Effect, Pass, PassResult
from fptq_compiler.graph.probe import Probe, between, outside_reader
from fptq_compiler.graph.program import NearMiss, Program, source_line
from fptq_compiler.graph.sites import LinearRef, MlpSite
from fptq_compiler.passes.linears import MOVES, is_linear, linear_ref, site_name

aten = torch.ops.aten
BARRIERS = (ops.rms_norm, ops.attention, aten.embedding.default, aten.layer_norm.default)
MAX_REGION = 40


class FindMlp(Pass):
    """Fill `program.sites.mlp`."""

    requires = ("attention_found",)
    provides = ("mlp_found",)
    effect = Effect.ANALYSES

    def run(self, program: Program) -> PassResult:
        """Look behind every linear for an activation over other linears."""
        probe = Probe(program.module)
        sites, misses = [], []
        for node in program.call_nodes(aten.linear.default):
            source = input_node(node)
            projections = _behind(source)
            if not projections:
                continue
            site, miss = _site(program, probe, node, source, projections)
            if site is not None:
                sites.append(site)
            if miss is not None:
                misses.append(miss)
        program.sites = replace(program.sites, mlp=tuple(sites))
        return PassResult(0, tuple(misses))


def _behind(source: Node) -> list[Node]:
    """The linears behind `source` if only an MLP's arithmetic stands between; else nothing."""
    found: list[Node] = []
    stack, seen = [source], set()
    nonlinear = False
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if is_linear(node):
            found.append(node)
        elif node.target in BARRIERS or node.op == "placeholder" or len(seen) > MAX_REGION:
            return []
        else:
            nonlinear |= node.target not in MOVES and node.target is not aten.sym_size.int
            stack.extend(
                x for x in node.all_input_nodes
                if x.op != "get_attr" and not isinstance(x.meta.get("val"), torch.SymInt)
            )
    return sorted(found) if nonlinear else []


def _site(program: Program, probe: Probe, node: Node, source: Node, projections: list[Node]
          ) -> tuple[MlpSite | None, NearMiss | None]:
    down = linear_ref(program, node)
    if down is None or any(linear_ref(program, p) is None for p in projections):
        reason = "a weight of the MLP is not a parameter"
        return None, NearMiss("updown", node.name, reason, source_line(node))
    width = probe.region.shape(source)[-1]
    region = set().union(*(between(p, source) for p in projections))
    up, gate = _up_and_gate(program, probe, source, projections, width)
    refused: dict[str, str] = {}
    miss = None
    if up is None:
        refused["updown"] = (
            "no projection whose output channels pass to the down projection by a product"
        )
        miss = NearMiss("updown", source.name, refused["updown"], source_line(source))
    else:
        for projection in projections:
            reader = outside_reader(projection, region | {source}, node)
            if reader is not None and reader is not node:
                refused["updown"] = f"{projection.name} has a second reader, {reader.name}"
                miss = NearMiss("updown", reader.name, refused["updown"], source_line(reader))
    activation = next((str(n.target).split(".")[1] for n in sorted(region) if _bends(n)), "none")
    site = MlpSite(
        name=site_name(down.weight, node, node), up=up, gate=gate, down=down, width=width,
        activation=activation, refused=refused,
    )
    return site, miss


def _bends(node: Node) -> bool:
    """Whether the node is an activation: it acts on single values and is no product or sum."""
    pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return pointwise and node.target not in (aten.mul.Tensor, aten.add.Tensor)


def _up_and_gate(program: Program, probe: Probe, source: Node, projections: list[Node],
                 width: int) -> tuple[LinearRef | None, LinearRef | None]:
    """The range that scales the product channel by channel, and another that does not."""
    ranges = [
        (p, start)
        for p in projections
        for start in range(0, probe.region.shape(p)[-1] - width + 1, width)
    ]
    up: tuple[Node, int] | None = None
    for candidate in reversed(ranges):
        if _scales_through(probe, source, projections, candidate, width):
            up = candidate
            break
    rest = [r for r in ranges if r != up]
    refs = [
        linear_ref(program, r[0], r[1], r[1] + width) if r is not None else None
        for r in (up, rest[0] if rest else None)
    ]
    return refs[0], refs[1]


def _scales_through(probe: Probe, source: Node, projections: list[Node],
                    candidate: tuple[Node, int], width: int) -> bool:
    generator = torch.Generator().manual_seed(7)
    values = {
        p: torch.randn(probe.region.shape(p), generator=generator, dtype=torch.float64)
        for p in projections
    }
    scale = torch.rand(width, generator=generator, dtype=torch.float64) + 0.5
    plain = probe.region.value(source, values)
    if plain.shape[-1] != width:
        return False
    node, start = candidate
    scaled = values[node].clone()
    scaled[..., start : start + width] *= scale
    found = probe.region.value(source, {**values, node: scaled})
    error = (found - plain * scale).abs().max()
    return bool(error <= 1e-9 * plain.abs().max())
