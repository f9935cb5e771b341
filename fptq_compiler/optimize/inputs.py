"""What the maps act on: calibration activations as they are without the transform.

For the local objective with activations. At an IN port the activation that enters the linear is
x M, and for T_k the keys that leave their projection are; what is collected here is x, by
undoing M where it is merged into what comes before, or by looking in front of it where it is
computed online. Of several maps in front of one linear the first stands for all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from fptq_compiler.graph.blocks import BlockRunner
from fptq_compiler.graph.edges import WeightEdge, chains, is_online, online_map, weight_end
from fptq_compiler.graph.evaluate import Environment, run_node
from fptq_compiler.graph.inputs import input_node
from fptq_compiler.graph.program import Program
from fptq_compiler.transforms import Map, Side

ROWS = 512  # tokens kept for each map


@dataclass(frozen=True)
class _Wanted:
    """One map that acts on a range of a node's last axis, and whether it already has."""

    name: str
    done: bool = True
    repeat: int = 1
    start: int = 0
    stop: int | None = None


@torch.no_grad()
def map_inputs(program: Program, batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """By map name, rows (n, channels) of what it acts on, untransformed."""
    wanted: dict[Node, list[_Wanted]] = {}
    for node, want in dict.fromkeys((*_linear_inputs(program), *_keys(program))):
        wanted.setdefault(node, []).append(want)
    found: dict[str, list[Tensor]] = {}

    def step(node: Node, environment: Environment) -> object:
        value = run_node(program.module, node, environment, None)
        for want in wanted.get(node, ()):
            rows = value[..., want.start : want.stop].flatten(0, -2)
            rows = rows[:: max(1, rows.shape[0] * len(batches) // ROWS)]
            if want.done:
                rows = program.maps[want.name].right_inverse(rows, want.repeat)
            found.setdefault(want.name, []).append(rows)
        return value

    runner = BlockRunner(program, batches)
    for block in runner.blocks:
        runner.run_block(block, step)
    return {name: torch.cat(rows) for name, rows in found.items()}


def _linear_inputs(program: Program) -> Iterator[tuple[Node, _Wanted]]:
    """For every linear the first trainable map of one site in front, and what it acts on."""
    names = {id(transform): name for name, transform in program.maps.items()}
    plan = chains(program)
    for node in program.call_nodes(torch.ops.aten.linear.default):
        weight, source = node.args[1], node.args[0]
        end = weight_end(program, weight) if isinstance(weight, Node) else None
        if end is None or not isinstance(source, Node):
            continue
        for edge in plan.get(str(end.target), []):
            if not isinstance(edge, WeightEdge) or edge.port.side is not Side.IN:
                continue
            name = names[id(edge.transform)]
            if name != "residual" and edge.transform.has_parameters:
                place, done = _in_front(program, source, edge.transform)
                yield place, _Wanted(name, done, edge.port.repeat)
                break


def _in_front(program: Program, node: Node, transform: Map) -> tuple[Node, bool]:
    """What the online maps before a linear read, up to `transform` if it is one of them.

    Also whether the value is already transformed, as it is by a map that is merged.
    """
    while is_online(program, node):
        source = input_node(node)
        if online_map(program, node) is transform:
            return source, False
        node = source
    return node, True


def _keys(program: Program) -> Iterator[tuple[Node, _Wanted]]:
    """For every T_k, the projection whose output is the keys before RoPE."""
    for site in program.sites.attention:
        name = f"prerope.{site.name}"
        if name in program.maps and site.k is not None:
            yield (
                program.node(site.k.node),
                _Wanted(name, start=site.k.start, stop=site.k.stop),
            )
