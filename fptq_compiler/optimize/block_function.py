"""A block of a program as a differentiable function of the values that enter it.

What depends on nothing that is trained (the embedding's codes, a rotation's merged weights) is
computed once, when the function is made. Linear layers may multiply in bfloat16 and add in
float32, as the processors that have it do; their quantisers, and all else, stay in float32.
Attention goes through a fused kernel.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx, nn
from torch.fx import Node
from torch.nn.functional import linear

from fptq_compiler.graph import ops
from fptq_compiler.graph.blocks import Block, logits_node, outline
from fptq_compiler.graph.evaluate import (
    Environment,
    Watcher,
    ancestors,
    arguments,
    attribute,
    held,
    last_uses,
    run_node,
)
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.stored import StoredParameter
from fptq_compiler.optimize.fused_attention import fused_attention

aten = torch.ops.aten


class BlockFunction:
    """From what a block and later ones read to what later ones read."""

    def __init__(
        self,
        module: fx.GraphModule,
        block: Block,
        leaving: Collection[Node],
        constant: Collection[Node],
        compute: torch.dtype,
    ) -> None:
        """Compute what is constant.

        Args:
            module: its graph must not change while the function lives.
            block: without its settled nodes.
            leaving: the values, of this block or earlier ones, that later ones read.
            constant: nodes that neither inputs nor trained parameters reach; their values are
                held.
            compute: what linear layers multiply in, float32 or bfloat16.
        """
        self.name = block.name
        self._module = module
        self._nodes = block.nodes
        self._leaving = leaving
        self._compute = compute
        self._dying = {
            reader: [value for value in values if value not in leaving]
            for reader, values in last_uses(block.nodes).items()
        }
        read = [x for x in self.read if x in constant]
        self._constants = {node: self._constant(node) for node in read}

    def __call__(self, values: Environment, watch: Watcher | None = None) -> Environment:
        """The values that leave, from those that enter; `watch` sees every node and its value."""
        found = {**self._constants, **values}
        for node in self._nodes:
            found[node] = self._value(node, found)
            if watch is not None:
                watch(node, found[node])
            for dead in self._dying.get(node, ()):
                found.pop(dead, None)
        return {node: found[node] for node in self._leaving}

    @property
    def read(self) -> list[Node]:
        """The nodes whose values it reads, its own among them, each once."""
        return [*dict.fromkeys(x for node in self._nodes for x in node.all_input_nodes)]

    @property
    def entering(self) -> list[Node]:
        """The nodes of the values that it needs: not constant, and not its own."""
        own = {*self._constants, *self._nodes}
        return [node for node in self.read if node not in own]

    @property
    def parameters(self) -> list[Tensor]:
        """What it reads of the program's parameters, those of edges and quantisers included."""
        return [p for node in self._nodes for p in _parameters(self._module, node)]

    @property
    def modules(self) -> nn.ModuleList:
        """The edges and quantisers that run in it."""
        paths = dict.fromkeys(str(n.target) for n in self._nodes if n.op == "call_module")
        return nn.ModuleList(self._module.get_submodule(path) for path in paths)

    @torch.no_grad()
    def _constant(self, node: Node) -> object:
        """The value of a node: in what linears multiply in where it is their weight alone.

        A table that is looked up alone is mapped, where parameters are stored.
        """
        values: Environment = {}
        origins = []
        for step in ancestors(node):
            if step.op == "get_attr":
                origins.append(held(self._module, str(step.target)))
                values[step] = attribute(self._module, str(step.target))
            else:
                values[step] = run_node(self._module, step, values, None)
        value: object = values[node]
        if not isinstance(value, Tensor):
            return value
        readers = [reader for reader in self._nodes if node in reader.all_input_nodes]
        if all(r.target is aten.linear.default and r.args[1] is node for r in readers):
            value = value.to(self._compute)
        stored = [origin for origin in origins if isinstance(origin, StoredParameter)]
        if stored and all(reader.target is aten.embedding.default for reader in readers):
            return stored[0].mapped(value)
        return value.clone() if stored and node.op == "get_attr" else value

    def _value(self, node: Node, values: Environment) -> object:
        if node.target is ops.attention:
            return fused_attention(*arguments(self._module, node, values))
        if node.target is not aten.linear.default or self._compute is torch.float32:
            return run_node(self._module, node, values, None)
        x, weight, *bias = arguments(self._module, node, values)
        product = linear(x.to(self._compute), weight.to(self._compute)).float()
        return product + bias[0] if bias and bias[0] is not None else product


def block_functions(
    program: Program,
    trained: Collection[Tensor] = (),
    *,
    given: Collection[Tensor] = (),
    compute: torch.dtype = torch.float32,
    blocks: Sequence[Block] | None = None,
    hold: bool = False,
) -> Iterator[BlockFunction]:
    """The blocks in their order, each made when its turn comes: one alone need be in memory.

    Args:
        program: its graph must not change while the functions live.
        trained: the parameters whose values change.
        given: parameters whose values enter a block with its other values, under their nodes.
        compute: what linear layers multiply in, float32 or bfloat16.
        blocks: all nodes in their order; None for the program's outline.
        hold: keep the other parameters as a block reads them, for many runs.
    """
    moving = {id(p) for p in (*trained, *given)}
    settled = _settled(program, moving)
    fixed = _fixed(program, moving) if hold else set()
    moved = [
        replace(block, nodes=tuple(n for n in block.nodes if n not in settled))
        for block in (outline(program) if blocks is None else blocks)
    ]
    for block, leaving in zip(moved, _leaving(program, moved, settled), strict=True):
        yield BlockFunction(program.module, block, leaving, settled | fixed, compute)


def stream(values: Environment) -> Tensor | None:
    """The residual stream (B, S, d) among the values between two blocks; None where none is.

    Beside it only factors (B, S, 1) and tables of angles have three axes.
    """
    wide = [v for v in values.values() if isinstance(v, Tensor) and v.dim() == 3]
    return max(wide, key=lambda value: value.shape[-1], default=None)


def _leaving(
    program: Program, blocks: list[Block], settled: Collection[Node]
) -> list[set[Node]]:
    """For each block the values, of it or earlier ones, that later ones read."""
    found: list[set[Node]] = []
    needed = {logits_node(program)}
    for block in reversed(blocks):
        found.append({n for n in needed if n.op != "get_attr" and n not in settled})
        needed = (needed | {x for n in block.nodes for x in n.all_input_nodes}) - {*block.nodes}
    return found[::-1]


def _settled(program: Program, moving: Collection[int]) -> set[Node]:
    """The calls that neither inputs nor these parameters reach."""
    found: set[Node] = set()
    for node in program.graph.nodes:
        moves = any(id(p) in moving for p in _parameters(program.module, node))
        if node.op not in ("call_function", "call_module") or moves:
            continue
        if all(x in found or x.op == "get_attr" for x in node.all_input_nodes):
            found.add(node)
    return found


def _fixed(program: Program, moving: Collection[int]) -> set[Node]:
    """The nodes of the parameters that are not among these."""
    values = {
        n: held(program.module, str(n.target)) for n in program.graph.nodes if n.op == "get_attr"
    }
    return {n for n, v in values.items() if isinstance(v, nn.Parameter) and id(v) not in moving}


def _parameters(module: fx.GraphModule, node: Node) -> list[Tensor]:
    """What a node reads of the parameters, as an argument or inside its module."""
    found = [held(module, str(x.target)) for x in node.all_input_nodes if x.op == "get_attr"]
    if node.op == "call_module":
        found += module.get_submodule(str(node.target)).parameters()
    return [x for x in found if isinstance(x, Tensor)]
