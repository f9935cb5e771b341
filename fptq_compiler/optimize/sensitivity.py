"""Which block's quantisers cost the most: each alone at work, all others bypassed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from fptq_compiler.graph.blocks import BlockRunner, logits_node
from fptq_compiler.graph.evaluate import Environment, run_node
from fptq_compiler.graph.program import Program
from fptq_compiler.optimize.bypass import Bypass
from fptq_compiler.optimize.divergence import jensen_shannon
from fptq_compiler.progress import Progress, track


@torch.no_grad()
def block_sensitivity(
    program: Program, ids: Tensor, exact: Program, progress: Progress
) -> dict[str, float]:
    """The Jensen-Shannon divergence of the logits from those with no quantiser, by block.

    The float run goes through the blocks once. Where it enters a block a second run parts from
    it, with that block quantised and the later ones not. With L blocks that are L (L + 1) / 2
    runs of a block and L of the head: the time of about L / 2 runs of the model. Memory holds
    L residual streams (B, S, d) and the logits (B, S, V) twice.

    Args:
        program: with quantisers, their ranges known, and all transforms folded.
        ids: tokens (B, S).
        exact: the same before quantisers were placed, for the values of weights and biases in
            blocks that are not quantised.
        progress: one step a block; later ones take longer.

    Returns:
        Nats a token, for each block that has quantisers.
    """
    quantizers = {q.module for q in program.weight_quantizers}
    quantizers |= {q.module for q in program.activation_quantizers}
    runner, step = BlockRunner(program, [ids]), _OneBlockAtWork(program, exact)
    for block in track(runner.blocks, progress, "sensitivity", len(runner.blocks)):
        if any(node.op == "call_module" and node.target in quantizers for node in block.nodes):
            step.part(block.name, runner.fork())
        runner.run_block(block, step)
        step.at_work = None
    return step.found


class _OneBlockAtWork:
    """A block runner's step: quantisers are at work in one of its runs, in one block."""

    def __init__(self, program: Program, exact: Program) -> None:
        self._program = program
        self._bypass = Bypass(program, exact)
        self._logits = logits_node(program)
        self._reference: Tensor | None = None
        self._blocks: dict[int, str] = {}
        self.at_work: Environment | None = None
        self.found: dict[str, float] = {}

    def part(self, block: str, environment: Environment) -> None:
        """A run in which the quantisers of this block are at work begins."""
        self._blocks[id(environment)] = block
        self.at_work = environment

    def __call__(self, node: Node, environment: Environment) -> object:
        if environment is self.at_work:
            value = run_node(self._program.module, node, environment, None)
        else:
            value = self._bypass(node, environment)
        if node is not self._logits:
            return value
        assert isinstance(value, Tensor)
        if self._reference is None:  # the float run comes first
            self._reference = value
        else:
            divergence = jensen_shannon(value, self._reference)
            self.found[self._blocks[id(environment)]] = float(divergence)
        return None
