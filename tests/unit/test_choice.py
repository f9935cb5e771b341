"""Transforms are kept where held-out loss says so: greedy, one change after another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fptq_compiler import choice
from fptq_compiler.choice import choose_transforms, kinds
from fptq_compiler.choice.kinds import choose, choose_kinds, variants
from fptq_compiler.graph.dump import dump
from fptq_compiler.graph.program import Program
from fptq_compiler.progress import SilentProgress
from fptq_compiler.recipe import TRANSFORMS, Recipe, TransformsRecipe
from fptq_compiler.report import Report
from fptq_compiler.stages import take_in
from fptq_compiler.work import WorkFolder
from tests.compiling import quick
from tests.toys import ToyConfig, export_toy, make_tokens


def losses(table: dict[str, float]) -> tuple[Callable[[Recipe], float], list[Recipe]]:
    """A loss that starts at 1, to which each left-out transform adds its number."""
    asked: list[Recipe] = []

    def loss(recipe: Recipe) -> float:
        asked.append(recipe)
        left_out = set(TRANSFORMS) - set(recipe.transforms.candidates)
        places = "+".join(recipe.transforms.scaling_places)
        return 1.0 + sum(table.get(name, 0.5) for name in left_out) + table.get(places, 0.0)

    return loss, asked


def test_what_lowers_the_loss_is_kept() -> None:
    loss, asked = losses({"prerope": -0.2, "scaling": -0.1, "o_proj": 0.3})
    chosen, decisions = choose(Recipe(), loss)
    kept = tuple(name for name in TRANSFORMS if name not in ("prerope", "scaling"))
    assert chosen.transforms.candidates == kept
    assert chosen.transforms.scaling_places == ("down_proj",)
    assert len(asked) == len(decisions) == 1 + 2 + 6  # the recipe's own place is not tried again
    assert "trial without prerope: held-out loss 0.8000, chosen" in decisions


def test_another_place_of_scaling() -> None:
    loss, _ = losses({"down_proj+o_proj": -0.5})
    chosen, decisions = choose(Recipe(), loss)
    assert chosen.transforms.scaling_places == ("down_proj", "o_proj")
    assert chosen.transforms.candidates == TRANSFORMS
    assert "trial with scaling at down_proj and o_proj: held-out loss 0.5000, chosen" in decisions


def test_without_scaling_no_places_are_tried() -> None:
    recipe = Recipe(transforms=TransformsRecipe(names=("value",), where_possible=False))
    assert [words for words, _ in variants(recipe)] == ["without value"]


def test_a_tie_keeps_what_is_there() -> None:
    chosen, _ = choose(Recipe(), losses(dict.fromkeys(TRANSFORMS, 0.0))[0])
    assert chosen == Recipe()


def test_on_a_program_which_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = quick("4-4-4").override(steps=2, choose=True, transforms="auto")
    program = take_in(export_toy(ToyConfig(layers=1)))
    before = dump(program)
    ids = make_tokens(ToyConfig(layers=1), 4, 24)
    report = Report(origin="toy")
    work = WorkFolder(tmp_path, recipe, program)
    chosen = choose_transforms(
        program, recipe, ids[:2], ids, report, SilentProgress(), work=work
    )
    assert dump(program) == before
    assert torch.isfinite(program.run(ids)).all()
    assert [stage.name for stage in report.stages] == ["choice of transforms", "choice of sites"]
    trials = [d for d in report.decisions if d.startswith("trial")]
    assert len(trials) >= 7
    assert set(chosen.transforms.candidates) <= set(TRANSFORMS)
    monkeypatch.delattr(choice, "choose_kinds")  # a run that goes on tries nothing again
    later = Report(origin="toy")
    again = choose_transforms(
        program, recipe, ids[:2], ids, later, SilentProgress(), work=work
    )
    assert again == chosen
    assert later.decisions == report.decisions


def test_trials_that_were_finished_are_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = quick("4-4-4").override(steps=2, choose=True, transforms="auto")
    program, ids = take_in(export_toy(ToyConfig(layers=1))), make_tokens(ToyConfig(), 4, 24)
    work = WorkFolder(tmp_path, recipe, program)
    done: list[Recipe] = []

    def falling(program: Program, variant: Recipe, ids: Tensor, rows: Tensor) -> float:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(variant)
        return 1.0 / len(done)

    def high(program: Program, variant: Recipe, ids: Tensor, rows: Tensor) -> float:
        done.append(variant)
        return 2.0

    def choose_again() -> tuple[Recipe, list[str]]:
        report = Report(origin="toy")
        chosen = choose_kinds(
            program, recipe, ids[:2], ids, report, SilentProgress(), work=work
        )
        return chosen, report.decisions

    monkeypatch.setattr(kinds, "_trial_loss", falling)
    with pytest.raises(KeyboardInterrupt):
        choose_again()
    first, done[:] = [*done], []
    monkeypatch.setattr(kinds, "_trial_loss", high)
    chosen, decisions = choose_again()
    assert len(first) + len(done) == len(decisions) == 1 + 2 + 6
    assert "held-out loss 0.3333, chosen" in decisions[2]  # of the first run
    assert chosen == first[-1]
    done.clear()
    (kept,) = tmp_path.glob("trials-*.json")
    kept.write_text("[]")  # damaged, it is done again
    choose_again()
    assert len(done) == 1 + 2 + 6
