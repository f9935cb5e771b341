"""Which transforms a model keeps, and where, by held-out loss: first the kinds, then the sites."""

from __future__ import annotations

from torch import Tensor

from fptq_compiler.choice.kinds import choose_kinds
from fptq_compiler.choice.sites import choose_sites
from fptq_compiler.graph.program import Program
from fptq_compiler.progress import Progress
from fptq_compiler.recipe import Recipe
from fptq_compiler.report import Report
from fptq_compiler.work import WorkFolder

__all__ = ["choose_transforms"]


def choose_transforms(
    program: Program, recipe: Recipe, ids: Tensor, rows: Tensor, report: Report,
    progress: Progress, *, work: WorkFolder,
) -> Recipe:
    """The recipe with the transforms, places of S_n and sites that held-out text speaks for.

    Args:
        program: as captured; left as it is.
        recipe: how it is compiled.
        ids: calibration tokens (samples, length).
        rows: training tokens (N, S).
        report: gets the stages, and a decision for every trial and kind.
        progress: listens.
        work: keeps the trials and the choice, for a run that goes on.
    """
    kept = work.load_choice(ids, rows)
    if kept is not None:
        chosen, decisions = kept
        report.decisions.extend(decisions)
        return chosen
    before = len(report.decisions)
    with report.stage("choice of transforms"):
        recipe = choose_kinds(program, recipe, ids, rows, report, progress, work=work)
    with report.stage("choice of sites"):
        recipe = choose_sites(program, recipe, ids, rows, report, progress)
    work.save_choice(ids, rows, recipe, report.decisions[before:])
    return recipe
