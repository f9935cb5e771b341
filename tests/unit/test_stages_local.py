"""Stage one as a recipe asks for it: with activations wherever there is text anyway."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from fptq_compiler.graph.unlift import unlift
from fptq_compiler.progress import SilentProgress
from fptq_compiler.report import Report
from fptq_compiler.stages import needs_calibration
from fptq_compiler.stages.transforming import find_sites, insert_transforms
from tests.compiling import SMALL, quick
from tests.toys import export_toy, make_tokens

RECIPE = quick("4-8-8", verify="off")


def curves(objective: str, ids: Tensor | None) -> dict[str, list[float]]:
    """The losses of the local stage on a toy."""
    recipe = replace(RECIPE, local=replace(RECIPE.local, objective=objective))
    program, report = unlift(export_toy(SMALL)), Report(origin="test")
    find_sites(program, recipe, report)
    insert_transforms(program, recipe, ids, report, SilentProgress())
    return report.curves


def test_auto_takes_activations_where_there_is_text() -> None:
    ids = make_tokens(SMALL, 4, 24)
    assert RECIPE.local.objective == "auto"
    with_text, without = curves("auto", ids), curves("auto", None)
    assert with_text == curves("activations", ids)
    assert without == curves("weights", ids)
    assert with_text != without


def test_auto_asks_for_no_text() -> None:
    lean = replace(
        RECIPE, bits=replace(RECIPE.bits, activations=16, cache=16),
        weights=replace(RECIPE.weights, bias_correction=False, rounding="nearest"),
    )
    assert not needs_calibration(lean)
    assert needs_calibration(replace(lean, weights=replace(lean.weights, rounding="gptq")))
    assert needs_calibration(replace(lean, local=replace(lean.local, objective="activations")))
