"""A real pretrained model, SmolLM2-135M: function preservation, and perplexity at 4-8-8."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fptq_compiler.capture import capture
from fptq_compiler.capture.source import Captured
from fptq_compiler.cli import compile as compile_cli
from fptq_compiler.cli import evaluate as evaluate_cli
from fptq_compiler.cli.entry import run
from fptq_compiler.graph.pipeline import run_passes
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.unlift import unlift
from fptq_compiler.graph.verify import Verifier, relative_error
from fptq_compiler.passes import FIND_SITES, insertion
from fptq_compiler.passes.fold_transforms import FoldTransforms
from fptq_compiler.recipe import (
    TRANSFORMS,
    CalibrationRecipe,
    LocalRecipe,
    Recipe,
    TrainingRecipe,
)
from fptq_compiler.stages import vocabulary_of
from fptq_compiler.summary import applied_transforms

pytestmark = pytest.mark.slow

OFF_IDENTITY = 1e-9  # float64; right maps show 1e-13 over 30 layers, wrong ones over 1e-4
FOLDED = 1e-5  # of the largest logit, all in float32
BOUND = 100.0  # perplexity at 4-8-8; the original has 30, plain rounding thousands
LAYERS = 30
Observer = Callable[..., None]


@pytest.fixture(scope="module")
def captured(smollm2: Path) -> Captured:
    return capture(smollm2)


@pytest.fixture(scope="module")
def tokens(captured: Captured) -> Tensor:
    vocabulary = vocabulary_of(unlift(captured.program))
    return torch.randint(vocabulary, (1, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def original(captured: Captured, tokens: Tensor) -> Tensor:
    """Its logits in float32."""
    return unlift(captured.program).run(tokens)


@pytest.fixture(scope="module")
def verifier(captured: Captured) -> Verifier:
    """Its logits in float64, on a few tokens."""
    return Verifier(unlift(captured.program), vocabulary=1000, seed=0, tokens=6)


def transformed(captured: Captured, names: tuple[str, ...]) -> Program:
    program = unlift(captured.program)
    run_passes(program, FIND_SITES)
    places = ("down_proj", "o_proj")
    run_passes(program, insertion(names, seed=0, scaling_places=places))
    return program


@pytest.mark.parametrize("names", [*((n,) for n in TRANSFORMS), TRANSFORMS],
                         ids=[*TRANSFORMS, "all"])
def test_the_function_is_preserved(
    captured: Captured, verifier: Verifier, tokens: Tensor, original: Tensor,
    names: tuple[str, ...],
) -> None:
    program = transformed(captured, names)
    counts = dict.fromkeys(TRANSFORMS, LAYERS) | {"residual": 1, "scaling": 1}
    assert applied_transforms(program) == {name: counts[name] for name in names}
    assert verifier.error(program) <= OFF_IDENTITY
    generator = torch.Generator().manual_seed(0)
    for transform in program.maps.values():
        transform.randomize_(generator, 0.1)
    run_passes(program, (FoldTransforms(),))
    assert relative_error(program.run(tokens), original) <= FOLDED


def test_perplexity_at_4_8_8_from_the_command_line(
    smollm2: Path, shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shared_data / "text" / "wikitext-2-raw" / "wiki.test.raw"
    output, report, recipe = (tmp_path / name for name in ("m.onnx", "r.json", "recipe.toml"))
    chosen = replace(
        Recipe(), local=LocalRecipe(steps=20), training=TrainingRecipe(steps=0),
        calibration=CalibrationRecipe(4, 128),
    )
    recipe.write_text(chosen.to_toml(), encoding="utf-8")
    words = [str(smollm2), "-o", str(output), "--recipe", str(recipe), "--report", str(report)]
    assert run(compile_cli.command, words) == 0, capsys.readouterr().err
    said = json.loads(report.read_text(encoding="utf-8"))
    assert len(said["sites"]) == 2 * LAYERS + 1
    assert said["parity"]["activation codes wrong"] == 0
    assert said["size_after"] < 0.25 * said["size_before"]  # 4 bits of 32, and an 8-bit table
    capsys.readouterr()
    words = [str(output), "--text", str(text), "--tokenizer", str(smollm2)]
    words += ["--window", "512", "--tokens", "2048", "--json"]
    assert run(evaluate_cli.command, words) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["tokens"] == 2048
    assert 20 < result["perplexity"] < BOUND
