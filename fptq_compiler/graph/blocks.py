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

aten = torch.ops.aten
SOURCES = (aten.embedding.default, aten.linear.default, aten.conv2d.default)
SUMS = (aten.add.Tensor,)
VALUEWISE = (
    aten.mul.Tensor, aten.div.Tensor, aten.tanh.default, aten.to.dtype, aten._to_copy.default,
)


@dataclass(frozen=True)
class Block:
    """A run of nodes; `name` is embedding, blocks.N or head."""

    name: str
    nodes: tuple[Node, ...]


def outline(program: Program) -> list[Block]:
    """Cut the graph where one value alone goes on: in front of attentions, behind the last block.

    A model without such places is one block.
    """
    nodes = [n for n in program.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    cores = [i for i, n in enumerate(nodes) if n.target is ops.attention]
    narrow = _narrow_places(nodes)
    cuts = [max((i for i in narrow if i <= core), default=0) for core in cores]
    ends = [i for i in narrow if cores and i > cores[-1] and nodes[i - 1].target in SUMS]
    bounds = list(dict.fromkeys([*cuts, *ends[-1:]]))
    if not ends or 0 in cuts:
        return [Block("model", tuple(nodes))]
    labels = ["embedding", *(f"blocks.{i}" for i in range(len(bounds) - 1)), "head"]
    return [
        Block(label, tuple(nodes[start:stop]))
        for label, start, stop in zip(labels, [0, *bounds], [*bounds, len(nodes)], strict=True)
    ]


def outline_with_logits(program: Program) -> list[Block]:
    """The blocks, and behind them `logits`: the last linear, and what follows value by value.

    That block is empty where the logits are not made so.
    """
    *front, last = outline(program)
    logits = logits_node(program)
    tail = [logits]
    while tail[0].target in VALUEWISE and len(tail[0].all_input_nodes) == 1:
        tail.insert(0, tail[0].all_input_nodes[0])
    alone = {*tail, *logits.users}
    if (
        tail[0].target is not aten.linear.default or tail[0] not in last.nodes
        or any(user not in alone for node in tail for user in node.users)
    ):
        return [*front, last, Block("logits", ())]
    rest = tuple(node for node in last.nodes if node not in tail)
    return [*front, Block(last.name, rest), Block("logits", tuple(tail))]


def logits_node(program: Program) -> Node:
    """The node of the logits, the first output."""
    (output,) = (n for n in program.graph.nodes if n.op == "output")
    logits: Node = output.all_input_nodes[0]
    return logits


def _narrow_places(nodes: Sequence[Node]) -> list[int]:
    """Where a cut parts one value only: the first node behind it, once for each such value.

    What depends on sizes alone (positions, masks, tables of angles) does not count, nor do
    values of one channel (the factors of S_n), which are small.
    """
    last = {x: i for i, n in enumerate(nodes) for x in n.all_input_nodes}
    computed: set[Node] = set()
    alive: set[Node] = set()
    narrow: list[int] = []
    alone: set[Node] = set()
    for index, node in enumerate(nodes):
        if len(alive) == 1 and alive != alone:
            alone = set(alive)
            narrow.append(index)
        if node.target in SOURCES or not computed.isdisjoint(node.all_input_nodes):
            computed.add(node)
            if not _is_small(node):
                alive.add(node)
        alive = {x for x in alive if last.get(x, 0) > index}
    return narrow


def _is_small(node: Node) -> bool:
    value = node.meta.get("val")
    if isinstance(value, (list, tuple)):
        return False
    return not isinstance(value, Tensor) or value.dim() == 0 or value.shape[-1] == 1


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

    def fork(self) -> Environment:
        """The first batch once more, from here on with values of its own."""
        self._environments.append(dict(self._environments[0]))
        return self._environments[-1]

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
