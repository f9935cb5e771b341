"""What enters the maps: calibration activations as they are without the transform.

For the local objective with activations. At a map's IN side the activation is x M; what is
collected here is x, by undoing M where it stands in the graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Node

from fptq_compiler.graph.blocks import BlockRunner
from fptq_compiler.graph.edges import WeightEdge, chains
from fptq_compiler.graph.evaluate import Environment, run_node
from fptq_compiler.graph.program import Program
from fptq_compiler.transforms import Side

ROWS = 512  # tokens kept for each map


@torch.no_grad()
def map_inputs(program: Program, batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """By map name, up to ROWS rows (n, channels) of what its IN side reads, untransformed."""
    wanted = _readers(program)
    found: dict[str, Tensor] = {}

    def step(node: Node, environment: Environment) -> object:
        if node in wanted and wanted[node][0] not in found:
            name, repeat = wanted[node]
            source = node.args[0]
            assert isinstance(source, Node)
            rows = environment[source].flatten(0, -2)
            rows = rows[:: max(1, rows.shape[0] // ROWS)][:ROWS]
            undone = program.maps[name].right_inverse(rows, repeat)
            width = program.maps[name].size
            found[name] = undone.reshape(-1, repeat, width)[:, 0] if repeat == 1 else undone
        return run_node(program.module, node, environment, None)

    runner = BlockRunner(program, batches)
    for block in runner.blocks:
        runner.run_block(block, step)
    return found


def _readers(program: Program) -> dict[Node, tuple[str, int]]:
    """For every trainable map with an IN port, the linear that reads it and its repeat."""
    names = {id(transform): name for name, transform in program.maps.items()}
    plan = chains(program)
    wanted: dict[Node, tuple[str, int]] = {}
    for node in program.call_nodes(torch.ops.aten.linear.default):
        end = node.args[1]
        while isinstance(end, Node) and end.op == "call_module":
            end = end.args[0]
        if not isinstance(end, Node):
            continue
        for edge in plan.get(str(end.target), []):
            if not isinstance(edge, WeightEdge) or edge.port.side is not Side.IN:
                continue
            name = names[id(edge.transform)]
            trainable = any(True for _ in edge.transform.parameters())
            if trainable and name != "residual":
                wanted[node] = (name, edge.port.repeat)
    return wanted
