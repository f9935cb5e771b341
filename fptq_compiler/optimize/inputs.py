"""What the maps act on: calibration activations as they are without the transform.

For the local objective with activations. At an IN port the activation that enters the linear is
x M, and for T_k the keys that leave their projection are; what is collected here is x, by
undoing M where it stands in the graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from fptq_compiler.graph.blocks import BlockRunner
from fptq_compiler.graph.edges import WeightEdge, chains, weight_end
from fptq_compiler.graph.evaluate import Environment, run_node
from fptq_compiler.graph.inputs import input_node
from fptq_compiler.graph.program import Program
from fptq_compiler.transforms import Side

ROWS = 512  # tokens kept for each map


@dataclass(frozen=True)
class _Wanted:
    """One map that acts on a range of a node's last axis."""

    name: str
    repeat: int = 1
    start: int = 0
    stop: int | None = None


@torch.no_grad()
def map_inputs(program: Program, batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """By map name, rows (n, channels of the map) of what it acts on, untransformed.

    Query heads that share one block of a map count as rows of their own.
    """
    wanted: dict[Node, list[_Wanted]] = {}
    for node, want in (*_linear_inputs(program), *_keys(program)):
        wanted.setdefault(node, []).append(want)
    found: dict[str, list[Tensor]] = {}

    def step(node: Node, environment: Environment) -> object:
        value = run_node(program.module, node, environment, None)
        for want in wanted.get(node, ()):
            rows = value[..., want.start : want.stop].flatten(0, -2)
            rows = rows[:: max(1, rows.shape[0] * len(batches) // ROWS)]
            undone = program.maps[want.name].right_inverse(rows, want.repeat)
            kept = found.setdefault(want.name, [])
            kept.append(_heads_as_rows(program, want.name, undone, want.repeat))
        return value

    runner = BlockRunner(program, batches)
    for block in runner.blocks:
        runner.run_block(block, step)
    return {name: torch.cat(rows) for name, rows in found.items()}


def _heads_as_rows(program: Program, name: str, rows: Tensor, repeat: int) -> Tensor:
    """(n, blocks · repeat · block) -> (n · repeat, blocks · block)."""
    transform = program.maps[name]
    split = rows.reshape(-1, transform.blocks, repeat, transform.block)
    return split.transpose(1, 2).reshape(-1, transform.size)


def _linear_inputs(program: Program) -> Iterator[tuple[Node, _Wanted]]:
    """For every trainable map of one site with an IN port, the value that its linear reads."""
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
                yield _before_online(source), _Wanted(name, edge.port.repeat)


def _before_online(node: Node) -> Node:
    """What an online map reads, where `node` is one; its inverse stands in the weight."""
    while node.op == "call_module" and str(node.target).startswith("online."):
        source = input_node(node)
        node = source
    return node


def _keys(program: Program) -> Iterator[tuple[Node, _Wanted]]:
    """For every T_k, the projection whose output is the keys before RoPE."""
    for site in program.sites.attention:
        name = f"prerope.{site.name}"
        if name in program.maps and site.k is not None:
            yield program.node(site.k.node), _Wanted(name, 1, site.k.start, site.k.stop)
