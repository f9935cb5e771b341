"""SmoothQuant: set the scale between a norm and its linears from both their largest values.

    s_j = max |x_j|^α / max |W_j|^(1-α)     x' = x diag(1/s)     W' = diag(s) W

This is arXiv 2211.10438; α moves outliers from the activations into the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node

from fptq_compiler.graph.blocks import BlockRunner
from fptq_compiler.graph.edges import Edge, WeightEdge, chains, online_map
from fptq_compiler.graph.evaluate import Environment, run_node
from fptq_compiler.graph.inputs import input_node
from fptq_compiler.graph.program import Program
from fptq_compiler.progress import Progress
from fptq_compiler.transforms import Diagonal, Map

LEAST = 1e-5  # a channel that is never used has a largest value of 0


@torch.no_grad()
def set_smoothing(
    program: Program, batches: Sequence[Tensor], alpha: float, progress: Progress
) -> None:
    """Set every map `smooth.*`; all others are left as they are.

    Args:
        program: with maps inserted and weights not folded.
        batches: calibration token ids, each (B, S).
        alpha: 0 leaves the activations' outliers, 1 moves them into the weights.
        progress: one step a block.
    """
    smooth = {m for n, m in program.maps.items() if n.startswith("smooth.")}
    places = {
        node: transform
        for node in program.graph.nodes
        if (transform := online_map(program, node)) in smooth and transform is not None
    }
    if not places:
        return
    largest: dict[Map, Tensor] = {}

    def step(node: Node, environment: Environment) -> object:
        if node in places:
            values = environment[input_node(node)].flatten(0, -2).abs().amax(0)
            before = largest.get(places[node], values)
            largest[places[node]] = torch.maximum(before, values)
        return run_node(program.module, node, environment, None)

    runner = BlockRunner(program, batches)
    progress.start("smoothing", len(runner.blocks))
    for block in runner.blocks:
        needed = tuple(n for n in block.nodes if n <= max(places))
        runner.run_block(replace(block, nodes=needed), step)
        progress.advance(1, block.name)
    progress.done()
    plan = chains(program)
    for transform, activation in largest.items():
        assert isinstance(transform, Diagonal)
        weight = _largest_weights(program, plan, transform)
        scale = activation.clamp_min(LEAST) ** alpha / weight.clamp_min(LEAST) ** (1 - alpha)
        transform.log_scale.copy_(-scale.log())


def _largest_weights(
    program: Program, plan: Mapping[str, list[Edge]], transform: Map
) -> Tensor:
    """(in,): of every input channel of all weights behind the map, without it."""
    found = []
    for name, edges in plan.items():
        mine = [e for e in edges if isinstance(e, WeightEdge) and e.transform is transform]
        if not mine:
            continue
        weight = program.parameter(name)
        for edge in edges[: edges.index(mine[0])]:
            weight = edge(weight)
        found.append(weight.abs().amax(0))
    return torch.stack(found).amax(0)
