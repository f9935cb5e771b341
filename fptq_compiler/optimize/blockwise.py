"""Between the local and the end-to-end stage: each block learns its output in the float program.

The sequences go through the blocks together, once in float and once quantised. In front of each
block they wait while it is trained: only what enters and leaves that block is in memory, and the
values inside it for one step, so a model that is too large to be trained as a whole can be
trained here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.fx import Node

from fptq_compiler.errors import OptimizationError
from fptq_compiler.graph.blocks import outline
from fptq_compiler.graph.evaluate import Environment, Watcher, bind_inputs
from fptq_compiler.graph.program import Program
from fptq_compiler.optimize.batches import Batches
from fptq_compiler.optimize.block_function import BlockFunction, block_functions, stream
from fptq_compiler.optimize.ranks import ranks
from fptq_compiler.optimize.student import first_infinite
from fptq_compiler.optimize.trainable import Group
from fptq_compiler.optimize.training import Keeper, Plan, train
from fptq_compiler.optimize.training_state import TrainingState
from fptq_compiler.progress import Progress
from fptq_compiler.transforms.dense import shared_evaluation

SMALLEST = 1e-12  # mean square of a token that an error is divided by


class BlockStudent:
    """A block of the quantised program, on the sequences that wait in front of it."""

    def __init__(self, block: BlockFunction, entering: Sequence[Environment]) -> None:
        self.module: nn.Module = block.modules
        self._block = block
        self._entering = entering

    def __call__(self, number: Tensor, watch: Watcher | None = None) -> Tensor:
        """The residual stream (B, S, d) behind the block, of the sequences with that number."""
        return _stream(self._block(self._entering[int(number)], watch))

    def first_infinite(self, number: Tensor) -> str | None:
        """The first node whose value is not finite, with its line in the model's code."""
        return first_infinite(partial(self, number))


def relative_error(student: BlockStudent, expected: Sequence[Tensor], number: Tensor) -> Tensor:
    """The mean over tokens of |y - ŷ|² / |y|², which is how much the norm behind them sees; []."""
    exact = expected[int(number)]
    error = (student(number) - exact).square().mean(-1)
    return (error / exact.square().mean(-1).clamp_min(SMALLEST)).mean()


def train_blocks(
    program: Program,
    exact: Program,
    groups: Sequence[Group],
    batches: Batches,
    plan: Plan,
    *,
    inputs: str,
    compute: torch.dtype,
    keeper: Keeper,
    progress: Progress,
) -> dict[str, TrainingState]:
    """Train what each block alone reads, block after block; gives how each training ended.

    Args:
        program: with quantisers.
        exact: the same without them.
        groups: what is trained, by the block that reads it.
        batches: token ids; as many as one block needs are used for all.
        plan: steps and schedule of each block.
        inputs: what a block is trained on: "quantised" is what the blocks in front of it give
            now, "original" what they give in `exact`.
        compute: what linear layers multiply in.
        keeper: keeps the state of a block's training.
        progress: one step a block, in it one each of the training.

    Raises:
        OptimizationError: the graph has no blocks, or a loss or gradient is not finite.
    """
    size = max(1, batches.size // ranks())
    rows = torch.split(batches.rows[: plan.steps * batches.size], size)
    pieces = [*rows, *torch.split(batches.held_out, size)]
    numbered = _numbers(len(rows), len(pieces), batches.seed)
    quantised = [bind_inputs(program.module, program.arguments(ids), None) for ids in pieces]
    original = [bind_inputs(exact.module, exact.arguments(ids), None) for ids in pieces]
    named = {node.name: node for node in program.graph.nodes}
    trained = [p for group in groups for p in group.parameters.values()]
    functions = block_functions(program, trained, compute=compute, hold=True)
    states: dict[str, TrainingState] = {}
    progress.start("block-wise training", len(outline(program)) - 1)
    twins = block_functions(exact, compute=compute, hold=True)
    for block, twin in zip(functions, twins, strict=True):
        if block.name in ("model", "head"):
            break
        _advance(twin, original)
        mine = _read_by(block, groups)
        note = block.name
        if mine:
            progress.start(block.name, plan.steps)
            states[block.name] = state = train(
                BlockStudent(block, quantised), [_stream(values) for values in original],
                mine, numbered, plan,
                objective=relative_error, keeper=keeper, progress=progress,
            )
            progress.done()
            note = f"{block.name}: {state.words()}"
        _advance(block, quantised)
        if inputs == "original":
            _replace(quantised, original, named)
        progress.advance(1, note)
    progress.done()
    if not states:
        message = (
            "no block of the graph has anything to train: it cannot be cut at its residual "
            "stream, or all rates in [training] are 0; use [blockwise] steps = 0"
        )
        raise OptimizationError(message)
    return states


def _numbers(trained: int, count: int, seed: int) -> Batches:
    """The numbers of what is trained on, one a process and step, and of what is held out."""
    numbers = torch.arange(count).unsqueeze(1)
    return Batches(numbers[:trained], numbers[trained:], ranks(), seed)


def _read_by(block: BlockFunction, groups: Sequence[Group]) -> list[Group]:
    """The groups with only those parameters that the block reads, where there are any."""
    read = {id(parameter) for parameter in block.parameters}
    found = [
        Group(g.name, g.rate, {n: p for n, p in g.parameters.items() if id(p) in read})
        for g in groups
    ]
    return [group for group in found if group.parameters]


@torch.no_grad()
def _advance(block: BlockFunction, waiting: list[Environment]) -> None:
    """Take all sequences through a block."""
    with shared_evaluation(block.modules):
        for index, values in enumerate(waiting):
            waiting[index] = block(values)


def _replace(
    quantised: list[Environment], original: Sequence[Environment], named: dict[str, Node]
) -> None:
    """Let the next block read what the original has; the rest depends on sizes alone."""
    for values, exact in zip(quantised, original, strict=True):
        known = {named[node.name]: value for node, value in exact.items() if node.name in named}
        values.update({node: value for node, value in known.items() if node in values})


def _stream(values: Environment) -> Tensor:
    found = stream(values)
    assert found is not None, "blocks are cut where the residual stream alone goes on"
    return found
