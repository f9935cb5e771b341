"""A transform stays at a site where held-out text says so; each is judged beside all others."""

from __future__ import annotations

import pytest
import torch
from torch.export import ExportedProgram

from fptq_compiler.choice.sites import (
    Judge,
    Place,
    Worth,
    choose_sites,
    find_places,
    quantised,
)
from fptq_compiler.errors import RecipeError
from fptq_compiler.graph.dump import dump
from fptq_compiler.progress import SilentProgress
from fptq_compiler.recipe import Recipe
from fptq_compiler.report import Report
from fptq_compiler.stages import take_in, transform
from fptq_compiler.stages.transforming import find_sites, insert_transforms
from fptq_compiler.summary import site_rows
from tests.compiling import quick
from tests.toys import ToyConfig, export_toy, make_tokens

TWO = ToyConfig(layers=2)
RECIPE = quick("4-4-4").override(steps=2, transforms="updown,hadamard")
ROWS = make_tokens(TWO, 16, 24)
CALIBRATION = ROWS[:4]


@pytest.fixture(scope="module")
def exported() -> ExportedProgram:
    return export_toy(TWO)


def test_a_worth_is_the_loss_of_a_program_without_that_map(exported: ExportedProgram) -> None:
    program, report = take_in(exported), Report(origin="toy")
    inserted = program.copy()
    find_sites(inserted, RECIPE, report)
    insert_transforms(inserted, RECIPE, CALIBRATION, report, SilentProgress())
    judge = Judge(program, ROWS[-4:])
    everything = quantised(inserted, (), RECIPE, CALIBRATION, SilentProgress())
    places = {p.block: p for p in find_places(inserted) if p.kind == "hadamard"}
    assert [*places] == ["blocks.0", "blocks.1"]
    every = [name for place in places.values() for name in place.maps]
    lacking = quantised(inserted, every, RECIPE, CALIBRATION, SilentProgress())
    worths = judge.worths(everything, lacking, places, SilentProgress())
    for place, worth in worths.items():
        alone = quantised(inserted, place.maps, RECIPE, CALIBRATION, SilentProgress())
        more = judge.loss(alone) - judge.loss(everything)
        assert abs(more) > 1e-5
        assert worth.mean == pytest.approx(more, rel=1e-2)
        assert worth.error > 0.0


def test_places_and_what_they_cost(exported: ExportedProgram) -> None:
    program, report = take_in(exported), Report(origin="toy")
    find_sites(program, RECIPE, report)
    insert_transforms(program, RECIPE, CALIBRATION, report, SilentProgress())
    found = {(p.kind, p.block): p for p in find_places(program)}
    assert len(found) == 4
    assert found["hadamard", "blocks.1"].online
    assert not found["updown", "blocks.0"].online
    assert found["updown", "blocks.1"].left_out == ("updown.model.layers.1.mlp",)


@pytest.mark.parametrize(
    ("mean", "online", "stays"),
    [(0.1, False, True), (-0.05, False, True), (-0.2, False, False), (-0.05, True, False)],
)
def test_what_is_merged_needs_a_clear_reason_to_go(
    mean: float, online: bool, stays: bool
) -> None:
    assert Worth(mean, 0.1).stays(online) is stays


def chosen_with(
    monkeypatch: pytest.MonkeyPatch, exported: ExportedProgram, losses: list[float]
) -> tuple[Recipe, Report]:
    """The choice when every updown is harmful and the two whole programs have these losses."""

    def worths(*arguments: object) -> dict[Place, Worth]:
        places = arguments[3]
        assert isinstance(places, dict)
        return {p: Worth(-0.2 if p.kind == "updown" else 0.2, 0.1) for p in places.values()}

    monkeypatch.setattr(Judge, "worths", worths)
    monkeypatch.setattr(Judge, "loss", lambda *_: losses.pop(0))
    program, report = take_in(exported), Report(origin="toy")
    before = dump(program)
    found = choose_sites(program, RECIPE, CALIBRATION, ROWS, report, SilentProgress())
    assert dump(program) == before
    return found, report


def test_harmful_ones_are_left_out(
    monkeypatch: pytest.MonkeyPatch, exported: ExportedProgram
) -> None:
    found, report = chosen_with(monkeypatch, exported, [1.0, 0.9])
    left = ("updown.model.layers.0.mlp", "updown.model.layers.1.mlp")
    assert found.transforms.left_out == left
    assert found.transforms.candidates == RECIPE.transforms.candidates
    assert any(f"goes at 2 of 2: {', '.join(left)}" in words for words in report.decisions)
    assert "without these 2 0.9000, with them 1.0000: left out" in report.decisions[-1]


def test_together_they_have_to_help_too(
    monkeypatch: pytest.MonkeyPatch, exported: ExportedProgram
) -> None:
    found, report = chosen_with(monkeypatch, exported, [0.9, 1.0])
    assert found == RECIPE
    assert report.decisions[-1].endswith("kept")


def test_a_recipe_leaves_out_what_it_names(exported: ExportedProgram) -> None:
    text = RECIPE.to_toml().replace(
        "left_out = []", 'left_out = ["hadamard.model.layers.1.mlp"]'
    )
    recipe, program = Recipe.from_toml(text, "here"), take_in(exported)
    expected = program.run(ROWS)
    transform(program, recipe, CALIBRATION, Report(origin="toy"), SilentProgress())
    torch.testing.assert_close(program.run(ROWS), expected, rtol=1e-4, atol=1e-4)
    assert "hadamard.model.layers.0.mlp" in program.maps
    assert "hadamard.model.layers.1.mlp" not in program.maps
    row = next(row for row in site_rows(program) if row.name == "model.layers.1.mlp")
    assert row.not_applied["hadamard"] == "left out by the recipe"


def test_an_unknown_site_is_refused(exported: ExportedProgram) -> None:
    text = RECIPE.to_toml().replace("left_out = []", 'left_out = ["updown.nowhere"]')
    with pytest.raises(RecipeError, match=r"no site 'nowhere'; its sites are model\.layers\.0"):
        find_sites(take_in(exported), Recipe.from_toml(text, "here"), Report(origin="toy"))


def test_a_name_without_a_site_is_refused() -> None:
    text = RECIPE.to_toml().replace("left_out = []", 'left_out = ["updown"]')
    with pytest.raises(RecipeError, match="expected a transform, a point and a site"):
        Recipe.from_toml(text, "here")
