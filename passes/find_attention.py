"""Find the attention sites: projections, head layout and RoPE of every raised attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node

from fptq_compiler.graph import ops
from fptq_compiler.graph.inputs import input_node
from fptq_compiler.graph.pipeline import Effect, Pass, PassResult
from fptq_compiler.graph.probe import Probe, Refusal, between, outside_reader
from fptq_compiler.graph.program import NearMiss, Program, source_line
from fptq_compiler.graph.sites import AttentionSite, LinearRef, RopeLayout
from fptq_compiler.passes.linears import (
    forward_linear,
    linear_ref,
    nearest_linears,
    site_name,
)

Refuse = Callable[[str, str, Node], None]


class FindAttention(Pass):
    """Fill `program.sites.attention`; what is left out is reported as a near miss."""

    requires = ("attention_raised", "norms_raised")
    provides = ("attention_found",)
    effect = Effect.ANALYSES

    def run(self, program: Program) -> PassResult:
        """Probe every attention core."""
        probe = Probe(program.module)
        sites, misses = [], []
        for core in program.call_nodes(ops.attention):
            site, found_misses = _site(program, probe, core)
            sites.append(site)
            misses.extend(found_misses)
        program.sites = replace(program.sites, attention=tuple(sites))
        return PassResult(0, tuple(misses))


@dataclass(frozen=True)
class _Operand:
    """One attention operand traced back to its projection."""

    node: Node
    projection: Node
    ref: LinearRef
    index: Tensor
    factor: float
    region: set[Node]


def _trace(program: Program, probe: Probe, operand: Node) -> _Operand | Refusal:
    """The linear that makes `operand`, and which of its channels each head holds."""
    linears = nearest_linears(operand)
    if len(linears) != 1:
        return Refusal(f"{len(linears)} linear layers feed the operand, expected one", operand)
    projection = linears[0]
    features = probe.region.shape(projection)[-1]
    region = between(projection, operand)
    norm = next((n for n in region if n.target is ops.rms_norm), None)
    if norm is not None:
        return Refusal("a norm stands between the projection and attention (QK-norm)", norm)
    found = probe.channel_source(projection, operand, features)
    if isinstance(found, Refusal):
        return found
    index, factor = found
    heads, width = index.shape
    start = int(index.min())
    blocks = index - start - torch.arange(heads).unsqueeze(1) * width
    same = bool((blocks == blocks[:1]).all())
    if not same or sorted(blocks[0].tolist()) != list(range(width)):
        return Refusal("the heads are not contiguous blocks of the projection's channels", operand)
    ref = linear_ref(program, projection, start, start + heads * width)
    if ref is None:
        return Refusal("the projection's weight is not a parameter", projection)
    return _Operand(operand, projection, ref, index, factor, region)


def _site(program: Program, probe: Probe, core: Node) -> tuple[AttentionSite, list[NearMiss]]:
    q, k, v = (x for x in core.args[:3] if isinstance(x, Node))
    shape_q, shape_k = probe.region.shape(q), probe.region.shape(k)
    traced = {r: _trace(program, probe, x) for r, x in (("q", q), ("k", k), ("v", v))}
    refused: dict[str, str] = {}
    misses: list[NearMiss] = []

    def refuse(transform: str, reason: str, node: Node) -> None:
        if transform not in refused:
            refused[transform] = reason
            misses.append(NearMiss(transform, node.name, reason, source_line(node)))

    rope = _rope(probe, traced["q"], traced["k"], core, refuse)
    output = forward_linear(core)
    o = _output(program, probe, core, output, refuse)
    _check_value(probe, traced["v"], core, refuse)
    _check_readers(probe, traced, core, output, refuse)
    refs = {r: x.ref if isinstance(x, _Operand) else None for r, x in traced.items()}
    known = next((x.projection for x in traced.values() if isinstance(x, _Operand)), core)
    site = AttentionSite(
        name=site_name(o.weight if o else None, core, known),
        core=core.name,
        q=refs["q"], k=refs["k"], v=refs["v"], o=o,
        heads=shape_q[1], kv_heads=shape_k[1], head_dim=shape_q[3],
        key_node=k.name, value_node=v.name,
        rope=rope, refused=refused,
    )
    return site, misses


def _rope(probe: Probe, q: _Operand | Refusal, k: _Operand | Refusal, core: Node,
          refuse: Refuse) -> RopeLayout | None:
    """The pair layout that q and k share, in the projections' channel order."""
    layouts: list[RopeLayout] = []
    for role, operand in (("query", q), ("key", k)):
        if isinstance(operand, Refusal):
            refuse("prerope", f"{role}: {operand.reason}", operand.node or core)
            return None
        found = probe.rope(operand.projection, operand.node, operand.index, operand.factor)
        if isinstance(found, Refusal):
            refuse("prerope", f"{role}: {found.reason}", found.node or core)
            return None
        order = (operand.index[0] - operand.index.min()).tolist()
        layouts.append(_in_projection_order(found, order))
    if (layouts[0].pairs, layouts[0].passthrough) != (layouts[1].pairs, layouts[1].passthrough):
        refuse("prerope", "query and key rotate different pairs of channels", core)
        return None
    assert isinstance(q, _Operand)
    assert isinstance(k, _Operand)
    if q.index.shape[0] % k.index.shape[0]:
        refuse("prerope", "query heads are no multiple of the key heads", core)
        return None
    return layouts[1]


def _in_projection_order(layout: RopeLayout, order: list[int]) -> RopeLayout:
    if order == list(range(len(order))):
        return layout
    pairs = sorted((order[a], order[b]) for a, b in layout.pairs)
    passthrough = tuple(sorted(order[c] for c in layout.passthrough))
    return RopeLayout(tuple(pairs), passthrough, layout.scale, f"{layout.style}, permuted")


def _output(program: Program, probe: Probe, core: Node, output: Node | None,
            refuse: Refuse) -> LinearRef | None:
    if output is None:
        refuse("value", "no single linear layer reads the attention's output", core)
        return None
    source = input_node(output)
    ref = linear_ref(program, output)
    if ref is None:
        refuse("value", "the output projection's weight is not a parameter", output)
    elif not probe.is_head_merge(core, source):
        refuse("value", "the output projection does not read the heads side by side", output)
    return ref


def _check_value(probe: Probe, v: _Operand | Refusal, core: Node, refuse: Refuse) -> None:
    if isinstance(v, Refusal):
        refuse("value", f"value: {v.reason}", v.node or core)
    elif not torch.equal(v.index.flatten(), torch.arange(v.ref.start, v.ref.stop)):
        refuse("value", "value: the channels of a head are permuted after the projection", v.node)
    elif not probe.is_head_split(v.projection, v.node, v.index, v.factor):
        refuse("value", "value: the projection is changed depending on the position", v.node)


def _check_readers(probe: Probe, traced: dict[str, _Operand | Refusal], core: Node,
                   output: Node | None, refuse: Refuse) -> None:
    """Nothing but this attention may read what a transform changes."""
    operands = [x for x in traced.values() if isinstance(x, _Operand)]
    everything = set().union(*(x.region for x in operands)) | {core}
    for role, transform in (("v", "value"), ("q", "prerope"), ("k", "prerope")):
        operand = traced[role]
        if isinstance(operand, Refusal):
            continue
        packed = [x.region for x in operands if x.projection is operand.projection]
        packed += _beside(probe, operand, core)
        reader = outside_reader(operand.projection, set().union(*packed) | {core}, core)
        if reader is not None and reader not in everything:
            refuse(transform, f"{role} has a second reader, {reader.name}", reader)
    if output is not None:
        source = input_node(output)
        path = between(core, source)
        reader = outside_reader(core, path | {source, output}, output)
        if reader is not None:
            refuse("value", f"the attention's output has a second reader, {reader.name}", reader)


def _beside(probe: Probe, operand: _Operand, core: Node) -> list[set[Node]]:
    """What stands between the same projection and other operands that do not see this one."""
    generator = torch.Generator().manual_seed(8)
    shape, ref = probe.region.shape(operand.projection), operand.ref
    plain = torch.randn(shape, generator=generator, dtype=torch.float64)
    other = plain.clone()
    other[..., ref.start : ref.stop] += 1.0
    found = []
    for node in core.args[:3]:
        assert isinstance(node, Node)
        if node is operand.node or nearest_linears(node) != [operand.projection]:
            continue
        values = [probe.region.value(node, {operand.projection: x}) for x in (plain, other)]
        if torch.equal(*values):
            found.append(between(operand.projection, node))
    return found
