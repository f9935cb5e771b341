"""Put the channels of a packed projection in the order [queries | keys | values], head by head.

    GPT-NeoX    [q0 k0 v0 | q1 k1 v1 | ...]            a head's three side by side
    Falcon      [q0 q1 k0 v0 | q2 q3 k1 v1 | ...]      a group's queries, its key, its value

The rows of the weight and the bias are exchanged, and what the model took apart channel by channel
becomes three ranges. An output projection that reads the channels of all heads in another order
(an einsum over both) has its columns exchanged alike. Which channel a value holds is found by
giving every channel its number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from fptq_compiler.graph import ops
from fptq_compiler.graph.inputs import input_nodes
from fptq_compiler.graph.pipeline import Pass, PassResult
from fptq_compiler.graph.probe import Probe, Refusal, between, outside_reader
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.shaped import shaped_call
from fptq_compiler.graph.surgery import get_parameter, read_instead, set_parameter
from fptq_compiler.passes.attention_operands import linears
from fptq_compiler.passes.linears import forward_linear, parameter_readers

aten = torch.ops.aten


class UnpackHeads(Pass):
    """Reorder every projection whose heads are no ranges of its channels."""

    requires = ("attention_raised",)

    def run(self, program: Program) -> PassResult:
        """Look at every attention's projections."""
        changed = 0
        probe = Probe(program.module)
        for core in program.call_nodes(ops.attention):
            packed: dict[Node, list[Node]] = {}
            for operand in dict.fromkeys(x for x in core.args[:3] if isinstance(x, Node)):
                sources = linears(operand)
                if len(sources) == 1:
                    packed.setdefault(sources[0], []).append(operand)
            for projection, operands in packed.items():
                changed += _reorder(program, probe, core, projection, operands)
            changed += _reorder_output(program, probe, core)
        return PassResult(changed)


@dataclass(frozen=True)
class _Heads:
    """A value that holds channels of the projection and nothing else.

    Attributes:
        node: the value.
        order: its axes as (B, S, H, D).
        channels: (H, D), of the projection.
    """

    node: Node
    order: tuple[int, ...]
    channels: Tensor


def _reorder(
    program: Program, probe: Probe, core: Node, projection: Node, operands: list[Node]
) -> int:
    """Reorder one projection; 0 where its heads are ranges already, or cannot become ranges."""
    width = probe.region.shape(projection)[-1]
    sources = [probe.channel_source(projection, x, width) for x in operands]
    indices = [source[0] for source in sources if not isinstance(source, Refusal)]
    if len(indices) < len(operands) or all(_is_range(x) for x in indices):
        return 0
    order = torch.cat([index.flatten() for index in indices])
    weight, *bias = projection.args[1:]
    parameters = [p for p in (weight, *bias) if isinstance(p, Node)]
    alone = all(p.op == "get_attr" and parameter_readers(program, p) == 1 for p in parameters)
    if not alone or not torch.equal(order.sort().values, torch.arange(width)):
        return 0
    heads = [
        _last_heads(probe, projection, operand, index)
        for operand, index in zip(operands, indices, strict=True)
    ]
    region = set().union(*(between(projection, operand) for operand in operands))
    if None in heads or outside_reader(projection, region, core) is not None:
        return 0
    _exchange(program, projection, parameters, order)
    start = 0
    for index, found in zip(indices, heads, strict=True):
        assert found is not None
        _rewire(projection, found, index, start)
        start += index.numel()
    return 1


@torch.no_grad()
def _reorder_output(program: Program, probe: Probe, core: Node) -> int:
    """Let the output projection read the heads side by side."""
    output = forward_linear(core)
    if output is None:
        return 0
    source, weight = input_nodes(output, 2)
    if probe.is_head_merge(core, source):
        return 0
    if weight.op != "get_attr" or parameter_readers(program, weight) > 1:
        return 0
    numbers = torch.arange(torch.Size(probe.region.shape(core)).numel(), dtype=torch.float64)
    numbers = numbers.reshape(probe.region.shape(core))
    expected = numbers.transpose(1, 2).flatten(2)
    found = probe.region.value(source, {core: numbers})
    if found.shape != expected.shape:
        return 0
    order = torch.argsort(found[0, 0])  # numbers rise along the channels of one token
    if not torch.equal(found[..., order], expected):
        return 0
    graph = output.graph
    split = shaped_call(graph, output, aten.transpose.int, (core, 1, 2), like=core)
    merged = shaped_call(graph, output, aten.flatten.using_ints, (split, 2), like=core)
    name = str(weight.target)
    value = program.parameter(name)[:, order.to(program.device)].contiguous()
    set_parameter(program.module, name, value)
    stored = get_parameter(graph, output, name, value)
    output.args = (merged, stored, *output.args[2:])
    return 1


def _is_range(index: Tensor) -> bool:
    first = int(index.min())
    return torch.equal(index.flatten(), torch.arange(first, first + index.numel()))


def _last_heads(
    probe: Probe, projection: Node, operand: Node, index: Tensor
) -> _Heads | None:
    """The last value before the operand that holds its channels of each token, unchanged."""
    shape = probe.region.shape(projection)
    numbers = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    found = None
    for node in sorted(between(projection, operand)):
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.dim() != 4 or not value.is_floating_point():
            continue
        places = probe.region.value(node, {projection: numbers})
        inside = (places == places.round()) & (places >= 0) & (places < numbers.numel())
        if not bool(inside.all()):
            continue
        moved = probe.region.value(node, {projection: values})
        if torch.equal(values.flatten()[places.long()], moved):
            heads = _as_heads(node, places.long(), shape)
            if heads is not None and _repeats(heads.channels, index):
                found = heads
    return found


def _repeats(channels: Tensor, index: Tensor) -> bool:
    """Whether every head of `index` comes as often as the others, next to itself."""
    repeat = max(1, channels.shape[0] // index.shape[0])
    return torch.equal(channels, index.repeat_interleave(repeat, 0))


def _as_heads(node: Node, places: Tensor, shape: tuple[int, ...]) -> _Heads | None:
    """Read the axes off the places (in the flat projection) that a value holds."""
    batch, sequence, width = shape
    tokens = torch.arange(batch * sequence).reshape(batch, sequence, 1, 1)
    for order in ((0, 1, 2, 3), (0, 2, 1, 3), (1, 2, 0, 3), (2, 0, 1, 3)):
        moved = places.permute(order)
        if moved.shape[:2] != (batch, sequence):
            continue
        channels = moved % width
        if bool((moved // width == tokens).all()) and bool((channels == channels[:1, :1]).all()):
            return _Heads(node, order, channels[0, 0])
    return None


@torch.no_grad()
def _exchange(
    program: Program, projection: Node, parameters: list[Node], order: Tensor
) -> None:
    """Exchange the rows of the weight and the bias."""
    made = []
    for parameter in parameters:
        name = str(parameter.target)
        value = program.parameter(name)[order.to(program.device)].contiguous()
        set_parameter(program.module, name, value)
        made.append(get_parameter(program.graph, projection, name, value))
    projection.args = (projection.args[0], *made)


def _rewire(projection: Node, found: _Heads, index: Tensor, start: int) -> None:
    """Readers of the heads as they were read the range from `start` on.

    A value that repeats the heads of keys repeats them again.
    """
    before, graph = found.node.next, found.node.graph
    heads, width = index.shape

    def make(x: Node, target: Callable[..., object], *arguments: object) -> Node:
        return shaped_call(graph, before, target, (x, *arguments), like=found.node)

    x = make(projection, aten.slice.Tensor, 2, start, start + index.numel())
    x = make(x, aten.unflatten.int, 2, [heads, width])
    if found.channels.shape[0] > heads:
        x = make(x, aten.repeat_interleave.self_int, found.channels.shape[0] // heads, 2)
    x = make(x, aten.permute.default, [found.order.index(axis) for axis in range(4)])
    read_instead(found.node, x)
