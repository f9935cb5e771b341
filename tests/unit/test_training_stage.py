"""The stages that train, in a compilation: what they change, and that it is what ships."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fptq_compiler import stages
from fptq_compiler.driver import Options, compile_model
from fptq_compiler.graph.program import Program
from fptq_compiler.optimize.divergence import jensen_shannon
from fptq_compiler.progress import SilentProgress
from fptq_compiler.recipe import BlockwiseRecipe, LocalRecipe, Recipe, TrainingRecipe
from fptq_compiler.report import Report
from fptq_compiler.stages import needs_calibration
from fptq_compiler.stages.training import TrainingStage
from fptq_compiler.work import TrainingFile
from tests.compiling import SMALL, Compiled, keeping_program, quick, run_onnx
from tests.quantized_toy import exported_with_outliers
from tests.toys import make_tokens

ROWS = 16
FEW = TrainingRecipe(
    steps=10, batch=2, length=24, held_out=2, evaluate_every=5, compute="float32",
    transforms_rate=3e-2, matrices_rate=3e-3, weights_rate=3e-2, activations_rate=3e-2,
)


def recipe(setting: str = "4-4-4", **training: Any) -> Recipe:
    return quick(
        setting, verify="off", local=LocalRecipe(steps=0), training=replace(FEW, **training)
    )


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    """A calibration file of so many sequences."""
    path = tmp_path / "ids.npy"
    np.save(path, make_tokens(SMALL, ROWS, 24).numpy())
    return path


def compiled(chosen: Recipe, ids: Path, name: str = "toy") -> Compiled:
    path, options = ids.parent / f"{name}.onnx", Options(recipe=chosen, calibration=ids)
    toy = exported_with_outliers(SMALL)
    return keeping_program(lambda: compile_model(toy, path, options=options), path, chosen)


def distance(found: Compiled) -> float:
    """Of the file's next-token distributions from the original's, on text of the training."""
    tokens = make_tokens(SMALL, ROWS, 24)[:4]
    original = stages.take_in(exported_with_outliers(SMALL)).run(tokens)
    return float(jensen_shannon(run_onnx(found.path, tokens), original))


def test_a_trained_program_is_frozen_and_the_file_agrees_with_it(ids: Path) -> None:
    """The compilation compares every code of the file with the program in ONNX Runtime."""
    trained = compiled(recipe(), ids, "trained")
    plain = compiled(recipe(steps=0), ids, "plain")
    assert distance(trained) < 0.9 * distance(plain)
    assert trained.report.parity
    report = trained.report
    assert len(report.curves["end to end"]) == 10
    assert len(report.curves["end to end, held out"]) == 3
    assert [s.name for s in report.stages].count("end-to-end training") == 1
    assert any(d.startswith("trained end to end for 10 steps") for d in report.decisions)


def test_no_steps_leave_the_stage_out(ids: Path) -> None:
    plain = compiled(recipe(steps=0), ids)
    assert not any("train" in stage.name for stage in plain.report.stages)
    assert not any("end to end" in name for name in plain.report.curves)
    assert not any("trained" in words for words in plain.report.decisions)


@pytest.mark.parametrize("objective", ["forward-kl", "top-k-kl", "hidden-mse"])
def test_every_objective_gets_less(ids: Path, objective: str) -> None:
    _, report = trained_program(recipe(objective=objective, top_k=8))
    curve = report.curves["end to end, held out"]
    assert min(curve) < curve[0]


def trained_program(chosen: Recipe) -> tuple[Program, Report]:
    """The frozen program, without a file."""
    program = stages.take_in(exported_with_outliers(SMALL))
    report, silent = Report("toy"), SilentProgress()
    rows = make_tokens(SMALL, ROWS, 24)
    untrained = stages.transform(program, chosen, rows[:4], report, silent)
    assert untrained is not None
    stage = TrainingStage(
        untrained.original, untrained.transformed, untrained.maps, rows,
        TrainingFile(None),
    )
    stages.quantize(program, chosen, rows[:4], report, silent, training=stage)
    return program, report


@pytest.mark.parametrize(("kind", "rank"), [("lora", 4), ("full", 1)])
def test_corrections_are_trained_and_merged(kind: str, rank: int) -> None:
    rates = {"transforms_rate": 0.0, "matrices_rate": 0.0, "activations_rate": 0.0,
             "weights_rate": 0.0, "zero_points_rate": 0.0, "correction_rate": 3e-3}
    program, report = trained_program(recipe(weights=kind, rank=rank, **rates))
    plain, _ = trained_program(recipe(weights="none", **{**rates, "weights_rate": 1e-9}))
    curve = report.curves["end to end, held out"]
    assert min(curve) < curve[0]
    assert not [n for n in program.graph.nodes if n.op == "call_module"]
    codes = [f"{q.parameter}_codes" for q in program.weight_quantizers]
    changed = {n for n in codes if not torch.equal(program.parameter(n), plain.parameter(n))}
    linears = {
        f"{q.parameter}_codes" for q in program.weight_quantizers if q.role == "linear"
    }
    assert changed == linears


def test_a_residual_map_may_be_trained_too() -> None:
    program, report = trained_program(recipe(residual=True))
    curve = report.curves["end to end, held out"]
    assert min(curve) < curve[0]
    assert not [n for n in program.graph.nodes if n.op == "call_module"]


def test_blocks_may_be_trained_first_or_alone() -> None:
    chosen = replace(recipe(steps=0), blockwise=BlockwiseRecipe(steps=4))
    program, report = trained_program(chosen)
    assert list(report.curves)[-2:] == ["blocks.0", "blocks.0, held out"]
    assert [s.name for s in report.stages if "training" in s.name] == ["block-wise training"]
    assert any(d.startswith("trained 1 blocks for 4 steps each") for d in report.decisions)
    assert "frozen" in program.facts
    both = replace(chosen, training=replace(FEW, steps=2))
    _, report = trained_program(both)
    names = [s.name for s in report.stages if "training" in s.name]
    assert names == ["block-wise training", "end-to-end training"]


def test_training_needs_text_even_where_no_range_does() -> None:
    weight_only = quick("4-16-16")
    weight_only = replace(
        weight_only,
        weights=replace(weight_only.weights, bias_correction=False, rounding="nearest"),
    )
    assert not needs_calibration(weight_only)
    assert needs_calibration(replace(weight_only, training=TrainingRecipe(steps=1)))
    assert needs_calibration(replace(weight_only, blockwise=BlockwiseRecipe(steps=1)))
    assert not needs_calibration(quick("16-16-16", training=TrainingRecipe(steps=1)))
