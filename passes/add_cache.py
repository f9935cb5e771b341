"""Give a graph that sees whole sequences a KV cache: past in, present out.

    before  logits = f(input_ids)
    after   logits, present = f(input_ids, attention_mask, past)

Every attention becomes `fptq.cached_attention` on the projections' own layout (B, S, H·D); RoPE
goes into it as a table of angles by absolute position, read off the graph by evaluating it. Where
queries and keys go through an online map behind RoPE, both are rotated and mapped in front of it,
and the cache holds what was mapped.
Positions are counted by the attention mask, so that padding on either side does not move them.
What else depends on the position (the static factor of the first token) reads the same counts.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from dataclasses import replace as replace_fields

import torch
from torch import Tensor
from torch.fx import Node

from fptq_compiler.graph import cache_ops, ops
from fptq_compiler.graph.inputs import input_node
from fptq_compiler.graph.pipeline import Pass, PassResult
from fptq_compiler.graph.probe import Probe, Refusal
from fptq_compiler.graph.program import InputSpec, Program
from fptq_compiler.graph.rotary import HeadMap, Rotary, RotaryTables, head_map
from fptq_compiler.graph.surgery import call, get_parameter, replace, set_parameter
from fptq_compiler.passes.attention_core import SOFTMAX, attends
from fptq_compiler.passes.cache_proof import Proof
from fptq_compiler.passes.cache_refusal import refuse_cache
from fptq_compiler.passes.follow_positions import follow_positions, learned_positions
from fptq_compiler.passes.freeze_online import mix
from fptq_compiler.passes.linears import MOVES
from fptq_compiler.passes.merge_heads import merge_heads
from fptq_compiler.passes.place_quantizers import FLOAT_BITS

aten = torch.ops.aten
MASK = "attention_mask"
EXACT = 1e-9  # float64 against a factor that a model wrote down


class AddCache(Pass):
    """Rewrite all attentions; a model that has one that cannot be rewritten is refused."""

    provides = ("cached",)

    def __init__(self, length: int) -> None:
        """Take the longest sequence, past included, that the tables of angles cover."""
        self.length = length

    def run(self, program: Program) -> PassResult:
        """Rewrite once.

        Raises:
            UnsupportedModelError: naming the node that a cache cannot follow, and why.
        """
        if "cached" in program.facts:
            return PassResult(0)
        cores = program.call_nodes(ops.attention)
        _refuse_unraised(program, cores)
        expected = Proof.of(program)
        probe = Probe(program.module)
        angles = RotaryTables(program.module, probe, self.length)
        for core in cores:
            _lay_heads_side_by_side(probe, core)
        plans = [_plan(program, probe, angles, core) for core in cores]
        ids = _ids(program)
        learned = learned_positions(program, probe, ids)
        program.inputs = (replace_fields(program.inputs[0], dims=("batch", "sequence")),)
        plain = torch.empty((1, 1), dtype=torch.int64, device="meta")
        mask = _placeholder(program, MASK, plain, ("batch", "total"))
        first = next(n for n in program.graph.nodes if n.op not in ("placeholder", "get_attr"))
        positions = call(program.graph, first, cache_ops.positions, (mask, ids), like=ids)
        tables = _Tables(program)
        presents: list[Node] = []
        for layer, plan in enumerate(plans):
            presents += _rewrite(program, plan, layer, mask, positions, tables)
        (output,) = (n for n in program.graph.nodes if n.op == "output")
        logits = output.args[0]
        first_output = logits[0] if isinstance(logits, (tuple, list)) else logits
        output.args = ((first_output, *presents),)
        follow_positions(program, ids, positions, learned, self.length)
        names = [f"present.{n}.{kind}" for n in range(len(plans)) for kind in ("key", "value")]
        program.outputs = ("logits", *names)
        program.module.recompile()
        expected.check(program)
        return PassResult(len(plans))


def _refuse_unraised(program: Program, cores: list[Node]) -> None:
    """Every attention must be known as one, or the others would see only their own tokens."""
    left = [n for n in program.graph.nodes if n.target in SOFTMAX and attends(n)]
    if cores and not left:
        return
    misses = [m.reason for m in program.near_misses if m.what == "attention"]
    where = left[0] if left else next(iter(program.graph.nodes))
    refuse_cache(where, misses[0] if misses else "it was not recognised as attention")


@dataclass(frozen=True)
class _Stored:
    """What the cache holds of keys or values: their source and their static grid."""

    operand: Node
    scale: Tensor | None
    bits: int


@dataclass(frozen=True)
class _Plan:
    core: Node
    q: HeadMap
    k: HeadMap
    v: HeadMap
    key: _Stored
    value: _Stored
    rotary: Rotary | None
    end: Node | None
    maps: tuple[Node, Node] | None
    """What maps queries and keys online behind RoPE."""

    @property
    def scale(self) -> float:
        """Of the scores, with the factors that stand on queries and keys."""
        scale = self.core.args[5]
        assert isinstance(scale, float)
        return scale * self.q.factor * self.k.factor


def _plan(program: Program, probe: Probe, angles: RotaryTables, core: Node) -> _Plan:
    """Read one attention; nothing is changed yet."""
    q, k, v, mask, causal = core.args[:5]
    assert isinstance(q, Node)
    assert isinstance(k, Node)
    assert isinstance(v, Node)
    if mask is not None or not causal:
        refuse_cache(core, "its mask is not the plain causal one")
    key, value = _stored(program, k), _stored(program, v)
    maps = (q, key.operand) if q.target is mix and key.operand.target is mix else None
    if maps is not None:
        q, key = input_node(q), replace_fields(key, operand=input_node(key.operand))
    heads = [_head_map(probe, x) for x in (q, key.operand, value.operand)]
    of_q, of_k = _table(angles, heads[0], q), _table(angles, heads[1], key.operand)
    if (of_q is None) != (of_k is None) or (of_q and of_k and not of_q.equals(of_k)):
        refuse_cache(core, "queries and keys are not rotated alike")
    if heads[2].layout.style != "none":
        refuse_cache(value.operand, "the values are rotated")
    if abs(heads[2].factor - 1.0) > EXACT:
        refuse_cache(value.operand, f"the values are multiplied by {heads[2].factor}")
    if probe.region.shape(key.operand) != probe.region.shape(value.operand):
        refuse_cache(value.operand, "keys and values differ in heads or channels")
    end = _merge_end(probe, core)
    return _Plan(core, heads[0], heads[1], heads[2], key, value, of_q, end, maps)


def _lay_heads_side_by_side(probe: Probe, core: Node) -> None:
    """Give every operand a value (B, S, H·D) to be read from, where it has none."""
    for position in range(3):
        operand = input_node(core, position)
        while operand.target in (ops.fake_quantize, cache_ops.stored, mix):
            operand = input_node(operand)
        if isinstance(head_map(probe, operand), Refusal):
            merge_heads(probe, operand)


def _head_map(probe: Probe, operand: Node) -> HeadMap:
    found = head_map(probe, operand)
    if isinstance(found, Refusal):
        refuse_cache(found.node or operand, found.reason)
    return found


def _table(
    angles: RotaryTables, mapped: HeadMap, operand: Node
) -> Rotary | None:
    found = angles.of(mapped, operand)
    if isinstance(found, Refusal):
        refuse_cache(found.node or operand, found.reason)
    return found


def _stored(program: Program, operand: Node) -> _Stored:
    """Look behind the quantiser, whose grid must be symmetric: that is what a cache holds."""
    if operand.target is ops.fake_quantize:
        zero_point = operand.args[2]
        refuse_cache(operand, f"its grid has a zero-point, {zero_point}, expected a symmetric one")
    if operand.target is not cache_ops.stored:
        return _Stored(operand, None, FLOAT_BITS)
    source, scale, bits = operand.args
    assert isinstance(source, Node)
    assert isinstance(scale, Node)
    assert isinstance(bits, int)
    return _Stored(source, program.parameter(str(scale.target)), bits)


class _Tables:
    """The tables of angles, one for all layers that rotate alike."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._known: list[tuple[str, Rotary]] = []

    def nodes(self, before: Node, rotary: Rotary) -> tuple[Node, Node]:
        """`get_attr` nodes of the cosines and sines."""
        name = next((n for n, r in self._known if r.equals(rotary)), None)
        module = self._program.module
        if name is None:
            name = f"rotary.{len(self._known)}"
            self._known.append((name, rotary))
            set_parameter(module, f"{name}.cos", rotary.cos)
            set_parameter(module, f"{name}.sin", rotary.sin)
        graph = self._program.graph
        return (
            get_parameter(graph, before, f"{name}.cos", rotary.cos),
            get_parameter(graph, before, f"{name}.sin", rotary.sin),
        )


def _rewrite(
    program: Program, plan: _Plan, layer: int, mask: Node, positions: Node, tables: _Tables
) -> list[Node]:
    """Replace one core; gives its present key and value."""
    graph, core, bits = program.graph, plan.core, plan.key.bits
    kv_heads = plan.k.heads
    width = int(plan.key.operand.meta["val"].shape[3]) // (2 if bits == 4 else 1)
    plain = torch.empty(
        (1, kv_heads, 0, width), dtype=cache_ops.CACHE_DTYPES[bits], device="meta"
    )
    dims = ("batch", kv_heads, "past", width)
    past = [
        _placeholder(program, f"past_key_values.{layer}.{kind}", plain, dims)
        for kind in ("key", "value")
    ]
    table: tuple[Node | None, Node | None] = (None, None)
    interleaved = False
    if plan.rotary is not None:
        table, interleaved = tables.nodes(core, plan.rotary), plan.rotary.interleaved
    scales = _scales(program, plan, layer)
    q, k = plan.q.source, plan.k.source
    if plan.maps is not None:
        q = _mapped(plan.q, plan.maps[0], core, positions, table, interleaved)
        k = _mapped(plan.k, plan.maps[1], core, positions, table, interleaved)
        table = (None, None)
    arguments = (
        q, k, plan.v.source, *past, mask, positions, *table, interleaved,
        plan.q.heads, kv_heads, plan.scale, bits, *scales, *core.args[6:],
    )
    cached = call(graph, core, cache_ops.cached_attention, arguments, like=None)
    merged, *present = [call(graph, core, operator.getitem, (cached, i), like=None)
                        for i in range(3)]
    merged.meta["val"] = plan.q.source.meta["val"]
    _replace_core(plan, merged)
    return present


def _mapped(
    mapped: HeadMap, online: Node, core: Node, positions: Node,
    table: tuple[Node | None, Node | None], interleaved: bool,
) -> Node:
    """Queries or keys (B, S, H·D), rotated and mapped as `online` maps them."""
    graph = core.graph
    x = call(graph, core, cache_ops.split_heads, (mapped.source, mapped.heads), like=None)
    if table[0] is not None:
        arguments = (x, *table, positions, interleaved)
        x = call(graph, core, cache_ops.rotate_at, arguments, like=None)
    x = call(graph, core, mix, (x, *online.args[1:]), like=None)
    return call(graph, core, aten.flatten.using_ints, (x, 2), like=mapped.source)


def _scales(program: Program, plan: _Plan, layer: int) -> list[Node | None]:
    """`get_attr` nodes of the scales of keys, without their factor, and of values."""
    found: list[Node | None] = []
    for kind, stored, factor in (("key", plan.key, plan.k.factor), ("value", plan.value, 1.0)):
        node = None
        if stored.scale is not None:
            name, scale = f"cache.{layer}.{kind}_scale", stored.scale / factor
            set_parameter(program.module, name, scale)
            node = get_parameter(program.graph, plan.core, name, scale)
        found.append(node)
    return found


def _replace_core(plan: _Plan, merged: Node) -> None:
    """Readers of the heads read `merged` (B, S, H·D)."""
    core = plan.core
    if plan.end is not None:
        replace(plan.end, merged)
        return
    heads = plan.q.heads
    split = call(core.graph, core, cache_ops.split_heads, (merged, heads), like=None)
    replace(core, call(core.graph, core, aten.transpose.int, (split, 1, 2), like=core))


def _merge_end(probe: Probe, core: Node) -> Node | None:
    """The node behind the core that holds its heads side by side, through moves only."""
    node = core
    while True:
        readers = [r for r in node.users if r.target is not aten.sym_size.int]
        if len(readers) != 1 or readers[0].target not in MOVES:
            return None
        node = readers[0]
        if probe.is_head_merge(core, node):
            return node


def _ids(program: Program) -> Node:
    inputs = [n for n in program.graph.nodes if n.op == "placeholder"]
    if len(inputs) != 1:
        refuse_cache(inputs[-1], "the model has further inputs; export it with token ids only")
    ids: Node = inputs[0]
    return ids


def _placeholder(
    program: Program, name: str, value: torch.Tensor, dims: tuple[int | str, ...]
) -> Node:
    """A new input behind the others; `value` is a meta tensor of its plain shape."""
    last = [n for n in program.graph.nodes if n.op == "placeholder"][-1]
    with program.graph.inserting_after(last):
        node: Node = program.graph.placeholder(name.replace(".", "_"))
    node.meta["val"] = value
    program.inputs = (*program.inputs, InputSpec(name, value.dtype, dims))
    return node
