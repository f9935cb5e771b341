"""Run a program with gradients: the student of the end-to-end stage.

What depends on nothing that is trained (the embedding's codes, a rotation's merged weights) is
computed once. Linear layers may multiply in bfloat16 and add in float32, as the processors that
have it do; their quantisers, and all else, stay in float32. With checkpointing only what enters
a block is kept, and the block runs again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial

import torch
from torch import Tensor, fx
from torch.fx import Node
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from fptq_compiler.graph.blocks import Block, outline
from fptq_compiler.graph.evaluate import (
    Environment,
    Watcher,
    arguments,
    bind_inputs,
    held,
    last_uses,
    run_node,
)
from fptq_compiler.graph.program import Program, source_line

LINEAR = torch.ops.aten.linear.default


class Student:
    """A program as a differentiable function from ids (B, S) to logits (B, S, V)."""

    def __init__(
        self,
        program: Program,
        trained: Collection[Tensor] = (),
        *,
        compute: torch.dtype = torch.float32,
        checkpointing: bool = False,
    ) -> None:
        """Compute what is constant.

        Args:
            program: its graph must not change while the student lives.
            trained: the parameters whose values change.
            compute: what linear layers multiply in, float32 or bfloat16.
            checkpointing: keep what enters a block and compute the rest again.
        """
        self.program = program
        self._compute = compute
        self._checkpointing = checkpointing
        self._blocks = outline(program)
        self._constants = _constants(program, {id(p) for p in trained}, compute)
        (output,) = (n for n in program.graph.nodes if n.op == "output")
        self._logits = output.all_input_nodes[0]
        self._dying = last_uses([n for b in self._blocks for n in b.nodes])
        self._entering = self._values_entering()

    def __call__(self, ids: Tensor, watch: Watcher | None = None) -> Tensor:
        """Logits (B, S, V) in float32; `watch` sees every node and its value."""
        logits = self._through(self._blocks, ids, watch)[self._logits]
        assert isinstance(logits, Tensor)
        return logits.float()

    def hidden(self, ids: Tensor) -> Tensor:
        """What the head reads (B, S, d)."""
        values = self._through(self._blocks[:-1], ids)
        wide = [v for v in values.values() if isinstance(v, Tensor) and v.dim() == 3]
        return max(wide, key=lambda value: value.shape[-1])

    @torch.no_grad()
    def first_infinite(self, ids: Tensor) -> str | None:
        """The first node whose value is not finite, with its line in the model's code."""
        found: list[str] = []

        def look(node: Node, value: object) -> None:
            if isinstance(value, Tensor) and not bool(value.isfinite().all()):
                found.append(f"{node.name} ({source_line(node)})")

        self(ids, look)
        return found[0] if found else None

    def _through(
        self, blocks: Sequence[Block], ids: Tensor, watch: Watcher | None = None
    ) -> Environment:
        """What is left to read behind the blocks."""
        values = bind_inputs(self.program.module, self.program.arguments(ids), None)
        following = [*self._entering[1:], {self._logits}]
        for block, later in zip(blocks, following, strict=False):
            run = partial(self._run, block, later, watch)
            if self._checkpointing and torch.is_grad_enabled():
                values = checkpoint(run, values, use_reentrant=False, preserve_rng_state=False)
            else:
                values = run(values)
        return values

    def _run(
        self, block: Block, later: Collection[Node], watch: Watcher | None, values: Environment
    ) -> Environment:
        """What later blocks read, from what this block and later ones read."""
        found = {**self._constants, **values}
        for node in block.nodes:
            if node in self._constants:
                continue
            found[node] = self._value(node, found)
            if watch is not None:
                watch(node, found[node])
            for dead in self._dying.get(node, ()):
                found.pop(dead, None)
        return {node: found[node] for node in later if node in found}

    def _value(self, node: Node, values: Environment) -> object:
        if node.target is not LINEAR or self._compute is torch.float32:
            return run_node(self.program.module, node, values, None)
        x, weight, *bias = arguments(self.program.module, node, values)
        product = linear(x.to(self._compute), weight.to(self._compute)).float()
        return product + bias[0] if bias and bias[0] is not None else product

    def _values_entering(self) -> list[set[Node]]:
        """For each block the values of earlier ones, and inputs, that it or a later one reads."""
        entering: list[set[Node]] = []
        needed: set[Node] = {self._logits}
        for block in reversed(self._blocks):
            needed |= {x for n in block.nodes for x in n.all_input_nodes}
            needed -= set(block.nodes)
            entering.append({n for n in needed if n.op != "get_attr"} - set(self._constants))
        return entering[::-1]


def _constants(program: Program, trained: set[int], compute: torch.dtype) -> Environment:
    """The values that inputs and trained parameters do not reach, and that others read."""
    module = program.module
    found: Environment = {}
    for node in program.graph.nodes:
        if node.op not in ("call_function", "call_module") or _reads(module, node, trained):
            continue
        if all(x in found or x.op == "get_attr" for x in node.all_input_nodes):
            with torch.no_grad():
                found[node] = run_node(module, node, found, None)
    kept = {n: v for n, v in found.items() if not all(u in found for u in n.users)}
    for node, value in kept.items():
        if all(u.target is LINEAR and u.args[1] is node for u in node.users):
            kept[node] = value.to(compute)
    return kept


def _reads(module: fx.GraphModule, node: Node, trained: set[int]) -> bool:
    """Whether a node reads a trained parameter, as an argument or inside its module."""
    named = [held(module, str(x.target)) for x in node.all_input_nodes if x.op == "get_attr"]
    if node.op == "call_module":
        named += module.get_submodule(str(node.target)).parameters()
    return any(id(parameter) in trained for parameter in named)
