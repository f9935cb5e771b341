"""Run a program with gradients: the student of the end-to-end stage.

With checkpointing only what enters a block is kept, and the block runs again in the backward
pass. Sharded, each rank holds a part of the frozen matrices of each block.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils.checkpoint import checkpoint

from fptq_compiler.errors import OptimizationError
from fptq_compiler.graph.blocks import Block, outline, outline_with_logits
from fptq_compiler.graph.evaluate import Environment, Watcher, bind_inputs
from fptq_compiler.graph.program import Program, source_line
from fptq_compiler.graph.stored import worth_holding
from fptq_compiler.optimize.block_function import BlockFunction, block_functions, stream
from fptq_compiler.optimize.last_linear import LastLinear
from fptq_compiler.optimize.shards import Shards, frozen_matrices, release, restore
from fptq_compiler.optimize.token_parts import Logits


class Student:
    """A program as a differentiable function from ids (B, S) to logits (B, S, V)."""

    def __init__(
        self,
        program: Program,
        trained: Collection[Tensor] = (),
        *,
        compute: torch.dtype = torch.float32,
        checkpointing: bool = False,
        sharded: bool = False,
    ) -> None:
        """Compute what is constant.

        Args:
            program: its graph must not change while the student lives.
            trained: the parameters whose values change.
            compute: what linear layers multiply in, float32 or bfloat16.
            checkpointing: keep what enters a block and compute the rest again.
            sharded: hold a part of the frozen matrices; the other ranks hold the rest.
        """
        self.program = program
        self._checkpointing = checkpointing
        self._matrices = frozen_matrices(program, trained) if sharded else {}
        # What shards hold can be read in its block alone, not a few tokens at a time.
        whole = [*outline(program), Block("logits", ())]
        *self._blocks, last = block_functions(
            program, trained, given=self._matrices.values(), compute=compute,
            blocks=whole if sharded else outline_with_logits(program),
            hold=worth_holding(program.module),
        )
        self._shards = [
            Shards(program, [m for m in self._matrices if m in block.read])
            for block in self._blocks if sharded
        ]
        self._last = LastLinear(program, last)

    def __call__(self, ids: Tensor, watch: Watcher | None = None) -> Tensor:
        """Logits (B, S, V) in float32; `watch` sees every node and its value."""
        return self._last(self._through(self._blocks, ids, watch), watch).whole()

    def logits(self, ids: Tensor) -> Logits:
        """The same, computed where they are read, a few tokens at a time."""
        return self._last(self._through(self._blocks, ids))

    @property
    def module(self) -> nn.Module:
        """Whose maps a step evaluates once."""
        return self.program.module

    def hidden(self, ids: Tensor) -> Tensor:
        """What the head reads (B, S, d).

        Raises:
            OptimizationError: the graph has no head of its own.
        """
        found = stream(self._through(self._blocks[:-1], ids))
        if found is None:
            message = (
                "the graph cannot be cut into blocks, so no hidden state enters a head; "
                "use another objective than hidden-mse"
            )
            raise OptimizationError(message)
        return found

    @contextmanager
    def released(self) -> Iterator[None]:
        """Inside, and after an error, the program's parameters hold nothing that shards hold."""
        release(self._matrices.values())
        yield
        restore(self._matrices, self._shards)

    def first_infinite(self, ids: Tensor) -> str | None:
        """The first node whose value is not finite, with its line in the model's code."""
        return first_infinite(partial(self, ids))

    def _through(
        self, blocks: Sequence[BlockFunction], ids: Tensor, watch: Watcher | None = None
    ) -> Environment:
        """What is left to read behind the blocks."""
        values = bind_inputs(self.program.module, self.program.arguments(ids), None)
        for index, block in enumerate(blocks):
            run = partial(block, watch=watch)
            if self._checkpointing and torch.is_grad_enabled():
                run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
            values = self._shards[index](run, values) if self._shards else run(values)
        return values


@torch.no_grad()
def first_infinite(run: Callable[[Watcher], object]) -> str | None:
    """The first node of a run whose value is not finite, with its line in the model's code."""
    found: list[str] = []

    def look(node: Node, value: object) -> None:
        if isinstance(value, Tensor) and not bool(value.isfinite().all()):
            found.append(f"{node.name} ({_line(node)})")

    run(look)
    return found[0] if found else None


def _line(node: Node) -> str:
    """The line that made a node; for what stands on a weight, that of what reads it."""
    while not (line := source_line(node)) and node.users:
        node = next(iter(node.users))
    return line
