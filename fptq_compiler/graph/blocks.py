"""The blocks of a model, and a run through them that keeps only one block in flight.

Blocks are views of the flat graph: a range of nodes between two points of the residual stream.
The graph stays one piece, so parameters keep their names and every pass sees the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fptq_compiler.graph import ops
from fptq_compiler.graph.evaluate import Environment, bind_inputs, run_node
from fptq_compiler.graph.program import Program


@dataclass(frozen=True)
class Block:
    """A run of nodes; `name` is embedding, blocks.N or head."""

    name: str
    nodes: tuple[Node, ...]


def outline(program: Program) -> list[Block]:
    """Cut the graph in front of the first norm of every attention, and behind the last block.

    A model without a residual site is one block.
    """
    nodes = [n for n in program.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    cores = [i for i, n in enumerate(nodes) if n.target is ops.attention]
    site = program.sites.residual
    if not cores or site is None:
        return [Block("model", tuple(nodes))]
    names = {n.name: i for i, n in enumerate(nodes)}
    stream = [names[s] for s in _stream_names(site.stream, names)]
    cuts: list[int] = []
    for core in cores:
        before = [i for i in stream if i < core]
        if before and before[-1] + 1 not in cuts:
            cuts.append(before[-1] + 1)
    cuts.append(stream[-1] + 1)
    bounds = [0, *cuts, len(nodes)]
    labels = ["embedding", *(f"blocks.{i}" for i in range(len(cuts) - 1)), "head"]
    return [
        Block(label, tuple(nodes[start:stop]))
        for label, start, stop in zip(labels, bounds, bounds[1:], strict=False)
    ]


def _stream_names(stream: Sequence[str], names: dict[str, int]) -> list[str]:
    """The stream's nodes under the names they have after S_n's rewrite."""
    renamed = [s if s in names else f"{s}_scaled" for s in stream]
    return [s for s in renamed if s in names]


Step = Callable[[Node, Environment], Any]


class BlockRunner:
    """Runs all batches through one block after another.

    `step` computes a node (by default as written); a pass that observes or replaces values gives
    its own. Between blocks only what later blocks read is kept, for every batch.
    """

    def __init__(
        self,
        program: Program,
        batches: Sequence[Tensor],
    ) -> None:
        self.program = program
        self._done: set[Node] = set()
        self.blocks = outline(program)
        self._environments = [
            bind_inputs(program.module, program.arguments(ids), None) for ids in batches
        ]

    def run_block(self, block: Block, step: Step | None = None) -> None:
        """Run every batch through one block, in order of `self.blocks`."""
        inside = set(block.nodes)
        module = self.program.module
        last_reader: dict[Node, Node] = {}
        for node in block.nodes:
            for argument in node.all_input_nodes:
                last_reader[argument] = node
        dying: dict[Node, list[Node]] = {}
        for argument, reader in last_reader.items():
            if all(user in inside or user in self._done for user in argument.users):
                dying.setdefault(reader, []).append(argument)
        self._done |= inside
        for environment in self._environments:
            with torch.no_grad():
                for node in block.nodes:
                    if step is not None:
                        environment[node] = step(node, environment)
                    else:
                        environment[node] = run_node(module, node, environment, None)
                    for dead in dying.get(node, ()):
                        environment.pop(dead, None)
