"""A program frozen by a recipe in one call, with nothing kept and nobody told: for comparisons."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from fptq_compiler.graph.program import Program
from fptq_compiler.progress import SilentProgress
from fptq_compiler.recipe import Recipe
from fptq_compiler.report import Report
from fptq_compiler.stages import quantize, transform
from fptq_compiler.stages.training import TrainingStage
from fptq_compiler.work import TrainingFile

QUICKER = 4  # times fewer local steps in a trial


def trial(recipe: Recipe) -> Recipe:
    """A recipe for comparisons: no proofs, training or GPTQ, and the maps are optimised less."""
    return replace(
        recipe,
        verify="off",
        local=replace(recipe.local, steps=-(-recipe.local.steps // QUICKER)),
        weights=replace(recipe.weights, rounding="nearest"),
        blockwise=replace(recipe.blockwise, steps=0),
        training=replace(recipe.training, steps=0),
    )


def freeze(program: Program, recipe: Recipe, ids: Tensor, rows: Tensor | None) -> Report:
    """Transform, quantise, train and freeze a program in place; gives the report.

    Args:
        program: as `take_in` leaves it.
        recipe: how.
        ids: calibration tokens (samples, length).
        rows: training tokens (N, S); None leaves the training out.

    Raises:
        FptqError: as the stages do.
    """
    report, silent = Report(origin="trial"), SilentProgress()
    left = transform(program, recipe, ids, report, silent)
    stage = None
    if rows is not None and left is not None:
        stage = TrainingStage(
            left.original, left.transformed, left.maps, rows, TrainingFile(None)
        )
    quantize(program, recipe, ids, report, silent, training=stage)
    return report
