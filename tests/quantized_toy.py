"""A toy as the stages that train get it: quantised and calibrated, its maps still on its edges."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.export import ExportedProgram

from fptq_compiler import stages
from fptq_compiler.graph.program import Program
from fptq_compiler.optimize.trainable import Group, trainable
from fptq_compiler.progress import Progress, SilentProgress
from fptq_compiler.recipe import LocalRecipe, Recipe, TrainingRecipe
from fptq_compiler.report import Report
from fptq_compiler.transforms import Map
from tests.compiling import quick
from tests.toys import ToyConfig, export_module, make_tokens, make_toy

OUTLIERS = 1.5
"""Standard deviation of the logarithms of the channels' sizes."""
RATES = {
    "transforms_rate": 3e-2, "matrices_rate": 3e-2, "weights_rate": 3e-2,
    "activations_rate": 3e-2, "zero_points_rate": 0.1, "correction_rate": 3e-2,
}


@cache
def exported_with_outliers(config: ToyConfig) -> ExportedProgram:
    """The export of a toy whose MLPs have channels of very different sizes.

    Only the input of `down_proj` shows it: what training has to mend is known.
    """
    toy = make_toy(config)
    generator = torch.Generator().manual_seed(0)
    for layer in toy.model.layers:
        sizes = torch.exp(OUTLIERS * torch.randn(config.mlp, generator=generator))
        layer.mlp.up_proj.weight.data *= sizes[:, None]
        layer.mlp.down_proj.weight.data /= sizes
    return export_module(toy)


@dataclass(frozen=True)
class Quantized:
    """What a training works with.

    Attributes:
        program: with quantisers, calibrated.
        transformed: the same without them.
        original: as captured.
        maps: those of the program that are to be trained.
        rows: token ids (12, 16).
    """

    program: Program
    transformed: Program
    original: Program
    maps: tuple[Map, ...]
    rows: Tensor


class _Keep:
    """Takes the place of the stages that train, and keeps what they would get."""

    def run(self, program: Program, recipe: Recipe, report: Report, progress: Progress) -> None:
        self.program = program.copy()


@cache
def _quantized(config: ToyConfig, setting: str, residual: bool) -> Quantized:
    recipe = quick(
        setting, verify="off", local=LocalRecipe(steps=0),
        training=TrainingRecipe(steps=1, residual=residual),
    )
    rows = make_tokens(config, 12, 16)
    program = stages.take_in(exported_with_outliers(config))
    report, silent, keep = Report("toy"), SilentProgress(), _Keep()
    untrained = stages.transform(program, recipe, rows[:4], report, silent)
    assert untrained is not None
    stages.quantize(program, recipe, rows[:4], report, silent, training=keep)  # type: ignore[arg-type]
    return Quantized(
        keep.program, untrained.transformed, untrained.original, untrained.maps, rows
    )


def groups_of(made: Quantized, **rates: float) -> AbstractContextManager[list[Group]]:
    """What is trained of a toy, at rates that move it within a few steps."""
    return trainable(made.program, made.maps, **{**RATES, **rates})


def parameters_of(groups: list[Group]) -> list[Tensor]:
    """All parameters of the groups, in their order."""
    return [parameter for group in groups for parameter in group.parameters.values()]


@contextmanager
def quantized(
    config: ToyConfig | None = None, setting: str = "4-4-4", *, residual: bool = False
) -> Iterator[Quantized]:
    """A toy quantised once for all tests; its values are put back at the end."""
    made = _quantized(config or ToyConfig(), setting, residual)
    own = Quantized(
        made.program.copy(), made.transformed, made.original, made.maps, made.rows
    )
    before = {name: value.clone() for name, value in own.program.module.state_dict().items()}
    try:
        yield own
    finally:
        with torch.no_grad():
            for name, value in before.items():
                own.program.parameter(name).copy_(value)
