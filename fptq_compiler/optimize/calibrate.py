"""Find the ranges: of weights from the weights, of activations from calibration tokens.

Activations go through the model block by block, in float, all batches at once, so that memory
grows with a block and not with the model. At every quantiser the values of all tokens are kept
until its range is found, then dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.fx import Node

from fptq_compiler.graph.blocks import BlockRunner
from fptq_compiler.graph.edges import transformed
from fptq_compiler.graph.evaluate import Environment
from fptq_compiler.graph.inputs import input_node
from fptq_compiler.graph.program import ActivationQuantizer, Program, WeightQuantizer
from fptq_compiler.memory import return_freed_memory
from fptq_compiler.optimize.bypass import Bypass
from fptq_compiler.optimize.pool import one_thread_each
from fptq_compiler.progress import Progress
from fptq_compiler.quant.grid import fake_quantize
from fptq_compiler.quant.modules import ActivationFakeQuantizer, WeightFakeQuantizer
from fptq_compiler.quant.ranges import activation_range, channel_scale, weight_scale
from fptq_compiler.quant.sqnr import sqnr

LINEAR = torch.ops.aten.linear.default
SINK_RATIO = 4.0  # first position this many times wider than all others: it gets its own range


@dataclass
class Calibration:
    """What was found.

    Attributes:
        sqnr: signal-to-noise ratio in dB, by quantiser node.
        first_position: the factors of position 0, by quantiser node that needs one.
        means: by linear node, the mean (K,) of its input, exact and as quantised; position 0,
            which is often a sink and is one of many, does not count.
        quantized_means: the latter by quantiser node.
    """

    sqnr: dict[str, float] = field(default_factory=dict)
    first_position: dict[str, float] = field(default_factory=dict)
    means: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    quantized_means: dict[str, Tensor] = field(default_factory=dict)


def calibrate_weights(program: Program, p: float, progress: Progress) -> dict[str, float]:
    """Search every weight's scale; gives the signal-to-noise ratio in dB by parameter."""
    found: dict[str, float] = {}
    progress.start("weight ranges", len(program.weight_quantizers))

    nodes = {n.target: n for n in program.graph.nodes if n.op == "call_module"}

    @torch.no_grad()
    def search(record: WeightQuantizer) -> float:
        module = program.module.get_submodule(record.module)
        assert isinstance(module, WeightFakeQuantizer)
        weight = transformed(program, input_node(nodes[record.module])).float()
        module.set_scale(weight_scale(weight, module.grid, module.granularity, p))
        return module.sqnr(weight)

    with one_thread_each() as pool:
        records = program.weight_quantizers
        for record, ratio in zip(records, pool.map(search, records), strict=True):
            found[record.parameter] = ratio
            progress.advance(1, record.parameter)
    return_freed_memory()
    progress.done()
    return found


class _Collector:
    """A block runner's step: quantisers pass their input on and keep it."""

    def __init__(self, program: Program, last: Node | None) -> None:
        self._bypass = Bypass(program)
        self._last = last
        self._records = {q.module: q for q in program.activation_quantizers}
        self.kept: dict[str, list[Tensor]] = {}
        self.means: dict[Node, list[Tensor]] = {}

    def __call__(self, node: Node, environment: Environment) -> object:
        if node.op == "call_module" and node.target in self._records:
            value = environment[input_node(node)]
            self.kept.setdefault(str(node.target), []).append(value.detach())
        if node.target is LINEAR:
            source = input_node(node)
            self.means.setdefault(node, []).append(token_mean(environment[source]))
            if node is self._last:
                return None  # the logits: the largest tensor of all, and nothing reads them
        return self._bypass(node, environment)


def token_mean(values: Tensor) -> Tensor:
    """The mean (K,) of (B, S, K) over all positions but the first, where there are others."""
    rest = values[:, 1:] if values.dim() == 3 and values.shape[1] > 1 else values
    return rest.flatten(0, -2).double().mean(0)


def calibrate_activations(
    program: Program,
    batches: Sequence[Tensor],
    *,
    p: float,
    sinks: str,
    progress: Progress,
) -> Calibration:
    """Set the range of every activation quantiser, and find the means of all linear inputs.

    Args:
        program: with quantisers placed; weights in float are used.
        batches: token ids (B, S) each.
        p: the norm that the clip search minimises.
        sinks: "first-position" gives position 0 a static factor of its own where it is much
            wider than the rest; "none" does not.
        progress: one step a block.

    Returns:
        Signal-to-noise ratios, and for each quantiser node that needs it the power of two by
        which position 0 is to be multiplied.
    """
    result = Calibration()
    runner = BlockRunner(program, batches)
    records = {q.module: q for q in program.activation_quantizers}
    progress.start("activation ranges", len(runner.blocks))
    watched = {*records, LINEAR}
    last = max((n for b in runner.blocks for n in b.nodes if n.target in watched), default=None)
    collector = _Collector(program, last)

    def ranged(item: tuple[str, list[Tensor]]) -> _Found:
        path, kept = item
        return _set_range(program, records[path], torch.cat(kept), p, sinks)

    for block in runner.blocks:
        needed = tuple(n for n in block.nodes if last is not None and n <= last)
        runner.run_block(replace(block, nodes=needed), collector)
        with one_thread_each() as pool:
            for found in pool.map(ranged, collector.kept.items()):
                found.record_in(result)
        for node, means in collector.means.items():
            exact = torch.stack(means).mean(0)
            result.means[node.name] = (exact, _quantized_mean(node, exact, result))
        collector.kept.clear()
        collector.means.clear()
        return_freed_memory()
        progress.advance(1, block.name)
    progress.done()
    program.facts.add("calibrated")
    return result


@dataclass(frozen=True)
class _Found:
    """What the search at one quantiser node gives."""

    node: str
    sqnr: float
    factor: float
    quantized_mean: Tensor

    def record_in(self, result: Calibration) -> None:
        result.sqnr[self.node] = self.sqnr
        result.quantized_means[self.node] = self.quantized_mean
        if self.factor != 1.0:
            result.first_position[self.node] = self.factor


@torch.no_grad()
def _set_range(
    program: Program, record: ActivationQuantizer, values: Tensor, p: float, sinks: str
) -> _Found:
    module = program.module.get_submodule(record.module)
    assert isinstance(module, ActivationFakeQuantizer)
    factor = 1.0
    if sinks == "first-position" and record.role == "linear input":
        factor = sink_factor(values)
    if factor != 1.0:
        values = values.clone()
        values[:, 0] *= factor
    if module.scale.dim():
        module.set_range(channel_scale(values, module.grid, p), torch.zeros(()))
    else:
        module.set_range(*activation_range(values, module.grid, p))
    quantized = fake_quantize(values, module.scale, module.zero_point, module.grid)
    return _Found(record.node, sqnr(values, quantized), factor, token_mean(quantized))


def _quantized_mean(node: Node, exact: Tensor, result: Calibration) -> Tensor:
    """The mean of what the linear reads once its quantiser is at work; `exact` without one."""
    source = input_node(node)
    return result.quantized_means.get(source.name, exact)


def sink_factor(values: Tensor) -> float:
    """The power of two that brings position 0 of (B, S, C) to the range of all others, or 1.

    Where tokens stand without their positions, as (T, C), there is no first one.
    """
    if values.dim() != 3 or values.shape[1] == 1:
        return 1.0
    first = float(values[:, 0].abs().max())
    rest = float(values[:, 1:].abs().max())
    if not first > SINK_RATIO * rest or rest == 0.0:
        return 1.0
    return float(2.0 ** torch.floor(torch.log2(torch.tensor(rest / first))).item())
