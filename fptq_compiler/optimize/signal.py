"""What the quantisers of a program do to the values of its float run, place by place."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Node

from fptq_compiler.graph.blocks import BlockRunner
from fptq_compiler.graph.evaluate import Environment
from fptq_compiler.graph.inputs import input_node
from fptq_compiler.graph.program import ActivationQuantizer, Program
from fptq_compiler.memory import return_freed_memory
from fptq_compiler.optimize.bypass import LINEAR, Bypass
from fptq_compiler.progress import Progress, track
from fptq_compiler.quant.modules import ActivationFakeQuantizer, WeightFakeQuantizer
from fptq_compiler.quant.sqnr import sqnr
from fptq_compiler.report import Histogram

BINS = 96


@dataclass
class Signal:
    """What was measured, by place: `weight of`, `input of`, `keys of`, `values of` a layer.

    Attributes:
        sqnr: signal-to-noise ratio of each quantiser in dB.
        histograms: of what enters the linears, their quantisers bypassed.
    """

    sqnr: dict[str, float] = field(default_factory=dict)
    histograms: dict[str, Histogram] = field(default_factory=dict)


@torch.no_grad()
def measure_signal(
    program: Program, ids: Tensor, exact: Program, progress: Progress
) -> Signal:
    """Run a program once in float, block by block, and look at every quantiser.

    Args:
        program: with quantisers, their ranges known, and all transforms folded.
        ids: tokens (B, S).
        exact: the same before quantisers were placed, for the values of weights and biases.
        progress: one step a block.
    """
    found = Signal()
    for record in program.weight_quantizers:
        module = program.module.get_submodule(record.module)
        assert isinstance(module, WeightFakeQuantizer)
        rounded = module(program.parameter(record.parameter))
        noise = sqnr(exact.parameter(record.parameter), rounded)
        found.sqnr[f"weight of {_layer(record.parameter)}"] = noise
    runner = BlockRunner(program, [ids])
    watcher = _Watcher(program, exact, found)
    for block in track(runner.blocks, progress, "signal and noise", len(runner.blocks)):
        runner.run_block(block, watcher)
        return_freed_memory()
    return found


class _Watcher:
    """A block runner's step: a float run that looks at quantisers and linear inputs."""

    def __init__(self, program: Program, exact: Program, found: Signal) -> None:
        self._program = program
        self._bypass = Bypass(program, exact)
        self._records = {q.module: q for q in program.activation_quantizers}
        self._found = found

    def __call__(self, node: Node, environment: Environment) -> object:
        value = self._bypass(node, environment)
        record = self._records.get(str(node.target)) if node.op == "call_module" else None
        if record is not None and isinstance(value, Tensor):
            module = self._program.module.get_submodule(record.module)
            assert isinstance(module, ActivationFakeQuantizer)
            self._found.sqnr[self._place(record)] = sqnr(value, module(value))
        if node.target is LINEAR:
            source = input_node(node)
            first = min(reader for reader in source.users if reader.target is LINEAR)
            if node is first:
                place = f"input of {_weight_layer(node)}"
                self._found.histograms[place] = histogram(environment[source])
        return value

    def _place(self, record: ActivationQuantizer) -> str:
        """Its role and the layer that reads it first."""
        first = min(self._program.node(name) for name in record.readers)
        if record.role not in ("key", "value"):
            return f"input of {_weight_layer(first)}"
        sites = {site.core: site.name for site in self._program.sites.attention}
        return f"{record.role}s of {sites.get(first.name, first.name)}"


def histogram(values: Tensor) -> Histogram:
    """How values of any shape are spread, in BINS bins from the least to the largest."""
    flat = values.detach().flatten().float()
    low, high = (float(extreme) for extreme in torch.aminmax(flat))
    centred = flat.double() - flat.double().mean()
    variance = float(centred.square().mean())
    kurtosis = float(centred.pow(4).mean()) / variance**2 if variance > 0.0 else 0.0
    counts = torch.histc(flat.cpu(), BINS, low, high).long().tolist()
    rms = float(flat.double().square().mean().sqrt())
    return Histogram(low, high, tuple(counts), rms, kurtosis)


def _weight_layer(linear: Node) -> str:
    """The layer whose weight a linear reads, through its quantiser."""
    source = input_node(linear, 1)
    while source.op == "call_module":
        source = input_node(source)
    return _layer(str(source.target)) if source.op == "get_attr" else linear.name


def _layer(parameter: str) -> str:
    return parameter.removesuffix(".weight")
