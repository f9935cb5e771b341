"""What is trained: maps, corrections, scales and zero-points, in groups with a rate each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils import parametrize

from fptq_compiler.graph.edges import DeltaEdge, LowRankEdge, chains
from fptq_compiler.graph.program import Program
from fptq_compiler.quant.modules import ActivationFakeQuantizer
from fptq_compiler.transforms import Map
from fptq_compiler.transforms.dense import DenseBlocks


@dataclass(frozen=True)
class Group:
    """Parameters by name that share a learning rate."""

    name: str
    rate: float
    parameters: dict[str, nn.Parameter]


class _Logarithm(nn.Module):
    """A positive parameter by its logarithm, so that steps are relative and it stays positive."""

    def forward(self, logarithm: Tensor) -> Tensor:
        """From the logarithm to the parameter."""
        return logarithm.exp()

    def right_inverse(self, parameter: Tensor) -> Tensor:
        """From the parameter to its logarithm."""
        return parameter.log()


@contextmanager
def trainable(
    program: Program,
    maps: Sequence[Map],
    *,
    transforms_rate: float,
    matrices_rate: float,
    weights_rate: float,
    activations_rate: float,
    zero_points_rate: float,
    correction_rate: float = 0.0,
) -> Iterator[list[Group]]:
    """The groups of a program with quantisers; inside the context scales are logarithms.

    Embedding and head, whose eight bits cost nothing, keep the scales of the range search.

    Args:
        program: its other parameters are frozen.
        maps: the transforms that still stand on their edges.
        transforms_rate: learning rate of the maps that act on channels or pairs of them.
        matrices_rate: of those that are matrices, all of whose entries turn a value together.
        weights_rate: of the logarithms of weight scales.
        activations_rate: of the logarithms of activation scales.
        zero_points_rate: of zero-points, in codes.
        correction_rate: of the corrections of weights, where there are any.
    """
    module = program.module
    module.requires_grad_(False)
    names = {id(transform): name for name, transform in program.maps.items()}
    weights = [q.module for q in program.weight_quantizers if q.role == "linear"]
    activations = [q.module for q in program.activation_quantizers]
    dense = [transform for transform in maps if isinstance(transform, DenseBlocks)]
    narrow = [transform for transform in maps if transform not in dense]
    with _logarithmic([module.get_submodule(path) for path in (*weights, *activations)]):
        groups = [
            Group("transforms", transforms_rate, _numbers(names, narrow)),
            Group("matrices", matrices_rate, _numbers(names, dense)),
            Group("weight scales", weights_rate, _scales(module, weights)),
            Group("activation scales", activations_rate, _scales(module, activations)),
            Group("zero-points", zero_points_rate, _zero_points(module, activations)),
            Group("weight corrections", correction_rate, _corrections(program)),
        ]
        groups = [group for group in groups if group.rate > 0 and group.parameters]
        for group in groups:
            for parameter in group.parameters.values():
                parameter.requires_grad_(True)
        try:
            yield groups
        finally:
            module.requires_grad_(False)


@contextmanager
def _logarithmic(quantizers: Sequence[nn.Module]) -> Iterator[None]:
    for quantizer in quantizers:
        parametrize.register_parametrization(quantizer, "scale", _Logarithm())
    try:
        yield
    finally:
        for quantizer in quantizers:
            parametrize.remove_parametrizations(quantizer, "scale", leave_parametrized=True)


def _numbers(names: Mapping[int, str], maps: Sequence[Map]) -> dict[str, nn.Parameter]:
    return {
        f"{names[id(transform)]}/{key}": parameter
        for transform in maps for key, parameter in transform.named_parameters()
    }


def _scales(module: nn.Module, paths: Sequence[str]) -> dict[str, nn.Parameter]:
    name = "parametrizations.scale.original"
    return {f"{path}/scale": module.get_parameter(f"{path}.{name}") for path in paths}


def _zero_points(module: nn.Module, paths: Sequence[str]) -> dict[str, nn.Parameter]:
    found = {}
    for path in paths:
        quantizer = module.get_submodule(path)
        assert isinstance(quantizer, ActivationFakeQuantizer)
        if not quantizer.grid.symmetric:
            found[f"{path}/zero_point"] = quantizer.zero_point
    return found


def _corrections(program: Program) -> dict[str, nn.Parameter]:
    return {
        f"{name}/{key}": parameter
        for name, edges in chains(program).items() for edge in edges
        if isinstance(edge, (LowRankEdge, DeltaEdge))
        for key, parameter in edge.named_parameters()
    }
