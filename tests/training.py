"""A toy as the end-to-end stage meets it: transformed and calibrated, with text to train on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fptq_compiler.graph.program import Program
from fptq_compiler.optimize.training import Keeper
from fptq_compiler.progress import Progress, SilentProgress
from fptq_compiler.recipe import CalibrationRecipe, LocalRecipe, Recipe, TrainingRecipe
from fptq_compiler.report import Report
from fptq_compiler.stages import quantize, take_in, transform
from fptq_compiler.stages.training import TrainingStage
from fptq_compiler.work import TrainingFile
from tests.compiling import SMALL
from tests.toys import ToyConfig, export_toy, make_tokens

STEPS = TrainingRecipe(
    steps=5, batch=2, length=8, held_out=3, evaluate_every=2, compute="float32"
)
TRAINED = Recipe(
    local=LocalRecipe(steps=1), training=STEPS, verify="off",
    calibration=CalibrationRecipe(samples=4, length=16),
)
NOTHING_KEPT = TrainingFile(None)


class LastValues:
    """A keeper that also has the values of the last state: those at the end are not the best."""

    def __init__(self, keeper: Keeper) -> None:
        self.keeper = keeper
        self.values: dict[str, Tensor] = {}

    def load(self) -> dict[str, object] | None:
        return self.keeper.load()

    def save(self, state: dict[str, Any]) -> None:
        self.keeper.save(state)
        named = zip(state["shapes"], state["values"], strict=True)
        self.values = {f"last of {name}": value.clone() for name, value in named}


def train_toy(
    keeper: Keeper = NOTHING_KEPT,
    *,
    progress: Progress | None = None,
    config: ToyConfig = SMALL,
    recipe: Recipe = TRAINED,
) -> tuple[dict[str, Tensor], list[float]]:
    """Train a toy; gives the frozen program's parameters, the last values, and the losses."""
    last = LastValues(keeper)
    program, stage = before_training(last, config=config, recipe=recipe)
    report = Report(origin="toy", recipe="", seed=0)
    ids = make_tokens(config, 4, 16)
    quantize(program, recipe, ids, report, progress or SilentProgress(), training=stage)
    return {**program.module.state_dict(), **last.values}, report.curves["end to end"]


def before_training(
    keeper: Keeper = NOTHING_KEPT, *, config: ToyConfig = SMALL, recipe: Recipe = TRAINED
) -> tuple[Program, TrainingStage]:
    """The folded program without quantisers, and the stage that trains it."""
    program = take_in(export_toy(config))
    report = Report(origin="toy", recipe="", seed=0)
    left = transform(program, recipe, make_tokens(config, 4, 16), report, SilentProgress())
    rows = make_tokens(config, 12, recipe.training.length)
    return program, TrainingStage(left.original, left.transformed, left.maps, rows, keeper)


def last_values(work: Path) -> dict[str, Tensor]:
    """The trained values of the state that a work folder holds."""
    (path,) = work.glob("training-*.pt")
    state = torch.load(path)
    return dict(zip(state["shapes"], state["values"], strict=True))


def same_values(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Whether two programs have the same parameters, bit for bit."""
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], value) for name, value in expected.items()
    )
