"""Round the weights by GPTQ, block by block, on the inputs that the quantised model gives them.

Calibration tokens go through the model with its activation quantisers at work and all earlier
weights rounded. Where all batches have reached the first linear that reads an input, the Hessian
of that input is whole: the weights of the linears that read it are rounded, and the run goes on
with them and with their biases corrected. An error that all tokens share is made up for by the
bias and is none of the weight, whose Hessian is then that of x - E[x]. Memory holds the values of
one block, and the Hessians of inputs that are not read yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.fx import Node

from fptq_compiler.errors import OptimizationError
from fptq_compiler.graph.blocks import Block, BlockRunner
from fptq_compiler.graph.evaluate import Environment, arguments, run_node
from fptq_compiler.graph.inputs import input_node
from fptq_compiler.graph.mean_shift import mean_shift
from fptq_compiler.graph.program import Program, WeightQuantizer
from fptq_compiler.graph.surgery import set_parameter
from fptq_compiler.memory import return_freed_memory
from fptq_compiler.optimize.calibrate import Calibration, token_mean
from fptq_compiler.optimize.mean_shift import LINEAR
from fptq_compiler.progress import Progress
from fptq_compiler.quant.gptq import factor, round_columns
from fptq_compiler.quant.modules import WeightFakeQuantizer
from fptq_compiler.quant.sqnr import sqnr


@dataclass
class Rounding:
    """What was found.

    Attributes:
        sqnr: signal-to-noise ratio in dB, by parameter.
        shifts: by linear node, the shift (N,) of its output's mean; none of the head.
    """

    sqnr: dict[str, float] = field(default_factory=dict)
    shifts: dict[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def round_weights(
    program: Program,
    batches: Sequence[Tensor],
    found: Calibration,
    *,
    correct_bias: bool,
    progress: Progress,
) -> Rounding:
    """Replace the weights of linears by values on their quantisers' grids.

    The head is rounded where it has 4 bits. A weight that linears with other inputs read too is
    rounded for the first of them.

    Args:
        program: with quantisers placed and all their ranges found, which stay as they are.
        batches: token ids (B, S) each.
        found: the float model's means, and the factors of position 0.
        correct_bias: correct the mean of every output that later weights see.
        progress: one step a block.

    Raises:
        OptimizationError: an input that a weight is rounded for is not finite.
    """
    rounder = _Rounder(program, found, correct_bias)
    runner = BlockRunner(program, batches)
    progress.start("GPTQ", len(runner.blocks))
    for block in runner.blocks:
        for part in rounder.parts(block):
            rounder.round_readers(part.nodes[0])
            runner.run_block(part, rounder)
        rounder.forget_weights()
        return_freed_memory()
        progress.advance(1, block.name)
    progress.done()
    return rounder.rounding


class _Hessian:
    """Of the n rows x (K,) of an input, whose mean is m: 2/n Σ (x - m) (x - m)ᵀ, or 2/n Σ x xᵀ."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._sum = torch.zeros(width, width, device=device)
        self._total = torch.zeros(width, dtype=torch.float64, device=device)
        self._count = 0
        self._means: list[Tensor] = []

    def add(self, values: Tensor, first: float) -> None:
        """Take values (.., S, K); position 0 counts as its quantiser sees it, times `first`."""
        self._means.append(token_mean(values))
        rows = times_at_first(values, first).flatten(0, -2).float()
        self._sum.addmm_(rows.t(), rows)
        self._total += rows.sum(0, dtype=torch.float64)
        self._count += len(rows)

    def value(self, *, centred: bool) -> Tensor:
        """The Hessian (K, K), around the mean or around 0."""
        if not centred:
            return self._sum * (2 / self._count)
        mean = self.mean()
        both = torch.outer(self._total / self._count, mean)
        return 2 * (self._sum.double() / self._count - both - both.t() + torch.outer(mean, mean))

    def mean(self) -> Tensor:
        """The mean (K,) of all rows but those of position 0."""
        return torch.stack(self._means).mean(0)


class _Rounder:
    """A block runner's step: the quantised model, whose inputs of linears are added up."""

    def __init__(self, program: Program, found: Calibration, correct_bias: bool) -> None:
        self.rounding = Rounding()
        self._program = program
        self._found = found
        self._correct_bias = correct_bias
        self._edges = _edges(program)
        self._readers: dict[Node, list[Node]] = {}
        for node in program.call_nodes(LINEAR):
            if input_node(node, 1) in self._edges:
                self._readers.setdefault(input_node(node), []).append(node)
        self._sources = {min(readers): source for source, readers in self._readers.items()}
        self._linears = {node for readers in self._readers.values() for node in readers}
        self._hessians: dict[Node, _Hessian] = {}
        self._weights: dict[Node, Tensor] = {}

    def parts(self, block: Block) -> Iterator[Block]:
        """The block cut in front of the first reader of each input, up to the last reader."""
        last = max(self._linears, default=None)
        nodes = [node for node in block.nodes if last is not None and node <= last]
        cuts = [i for i, node in enumerate(nodes) if node in self._sources]
        for start, stop in zip([0, *cuts], [*cuts, len(nodes)], strict=True):
            if start < stop:
                yield replace(block, nodes=tuple(nodes[start:stop]))

    def round_readers(self, first: Node) -> None:
        """Round the weights of all linears that read what `first` reads, if it is the first."""
        source = self._sources.get(first)
        if source is None:
            return
        hessian, readers = self._hessians.pop(source), self._readers[source]
        try:
            upper = factor(hessian.value(centred=all(self._corrects(node) for node in readers)))
        except ValueError as error:
            message = (
                f"GPTQ: the calibration inputs of {first.name} cannot be used: {error}; look for "
                "values that are not finite in the model, or use --rounding nearest"
            )
            raise OptimizationError(message) from error
        for node in readers:
            quantizer = self._edges[input_node(node, 1)]
            if quantizer.parameter not in self.rounding.sqnr:
                self._round(node, quantizer, upper, hessian.mean())

    def __call__(self, node: Node, environment: Environment) -> object:
        """The value of a node; weights are read where their linear is."""
        if node in self._edges:
            return None
        value = self._value(node, environment)
        if node in self._readers:
            assert isinstance(value, Tensor)
            if node not in self._hessians:
                self._hessians[node] = _Hessian(value.shape[-1], value.device)
            self._hessians[node].add(value, self._found.first_position.get(node.name, 1.0))
        return value

    def forget_weights(self) -> None:
        """Let the weights of a block go."""
        self._weights.clear()

    def _value(self, node: Node, environment: Environment) -> object:
        module = self._program.module
        if node in self._linears:
            x, _, *bias = arguments(module, node, environment)
            y = LINEAR(x, self._weight(input_node(node, 1)), *bias)
            shift = self.rounding.shifts.get(node.name)
            return y if shift is None else y + shift.to(y.dtype)
        first = self._found.first_position.get(node.name)
        if first is None:
            return run_node(module, node, environment, None)
        quantizer = module.get_submodule(str(node.target))
        values = times_at_first(environment[input_node(node)], first)
        return times_at_first(quantizer(values), 1 / first)

    def _weight(self, edge: Node) -> Tensor:
        if edge not in self._weights:
            self._weights[edge] = self._program.parameter(self._edges[edge].parameter)
        return self._weights[edge]

    def _round(
        self, node: Node, quantizer: WeightQuantizer, upper: Tensor, mean: Tensor
    ) -> None:
        module = self._program.module.get_submodule(quantizer.module)
        assert isinstance(module, WeightFakeQuantizer)
        weight, scale = self._program.parameter(quantizer.parameter), module.scale.detach()
        rounded = round_columns(weight, upper, scale, module.granularity, module.grid)
        if self._corrects(node):
            means = self._found.means[node.name][0], mean
            self.rounding.shifts[node.name] = mean_shift(weight, rounded, means)
        set_parameter(self._program.module, quantizer.parameter, rounded)
        self.rounding.sqnr[quantizer.parameter] = sqnr(weight, rounded)

    def _corrects(self, node: Node) -> bool:
        """Whether a bias keeps the mean of this linear's output."""
        return self._correct_bias and self._edges[input_node(node, 1)].role == "linear"


def times_at_first(values: Tensor, first: float) -> Tensor:
    """Values (.., S, K), position 0 multiplied by `first`."""
    if first == 1.0:
        return values
    changed = values.clone()
    changed[..., 0, :] *= first
    return changed


def _edges(program: Program) -> dict[Node, WeightQuantizer]:
    """The nodes of weight quantisers that only linears of computed values read."""
    chosen = {
        q.module: q for q in program.weight_quantizers
        if q.role == "linear" or (q.role == "head" and q.bits == 4)
    }
    return {
        node: chosen[str(node.target)]
        for node in program.graph.nodes
        if node.target in chosen and all(_reads_values(user) for user in node.users)
    }


def _reads_values(node: Node) -> bool:
    return node.target is LINEAR and input_node(node).op not in ("get_attr", "placeholder")
