"""The recipes of FPTQuant's neighbours, from a toy to a file that ONNX Runtime agrees with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fptq_compiler.recipe import BUILT_IN, Bits, CacheRecipe, Recipe
from tests.compiling import QUICK, SMALL, compile_toy

RECIPES = ("smoothquant", "quarot", "spinquant", "flatquant")
every_recipe = pytest.mark.parametrize("name", RECIPES)


def neighbour(name: str, bits: str = "4-8-8", *, cached: bool = False, **changes: str) -> Recipe:
    """A built-in recipe in seconds."""
    recipe = BUILT_IN[name]
    steps = min(recipe.local.steps, QUICK.local.steps)
    return replace(
        recipe, bits=Bits.parse(bits), local=replace(recipe.local, steps=steps),
        calibration=QUICK.calibration,
        cache=CacheRecipe(enabled=cached, max_length=40 if cached else 0), **changes,
    )


@every_recipe
@pytest.mark.parametrize(
    ("bits", "target", "cached"),
    [
        ("4-4-4", "ort-cpu", True),
        pytest.param("4-8-8", "qdq", False, marks=pytest.mark.slow),
        pytest.param("4-4-4", "ort-cpu", False, marks=pytest.mark.slow),
        pytest.param("4-8-8", "qdq", True, marks=pytest.mark.slow),
    ],
)
def test_a_file_agrees_with_its_program(
    name: str, bits: str, target: str, cached: bool, tmp_path: Path
) -> None:
    recipe = neighbour(name, bits, cached=cached, target=target)
    compiled = compile_toy(SMALL, recipe, tmp_path / "toy.onnx")
    report = compiled.report
    applied = {t for row in report.sites for t in row.transforms}
    assert applied == set(recipe.transforms.candidates)
    assert report.parity
