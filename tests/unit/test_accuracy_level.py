"""Weight-only linears at accuracy level 4 are faster and not weight-only: everything says so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fptq_compiler.errors import RecipeError
from fptq_compiler.recipe import Recipe
from fptq_compiler.runtime.session import load
from fptq_compiler.runtime.session_file import SessionFile, session_path, write_session_file
from tests.compiling import SMALL, Compiled, compile_toy, quick

KEY = "session.qdq_matmulnbits_accuracy_level"
WORDS = "W4 with dynamic INT8 activations (accuracy level 4), not W4A16"
IDS = np.arange(24).reshape(2, 12)


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    path = tmp_path_factory.mktemp("level") / "toy.onnx"
    recipe = quick("4-16-16").override(matmulnbits_accuracy_level=4)
    return compile_toy(SMALL, recipe, path)


def test_it_is_named_wherever_the_file_is_described(fast: Compiled) -> None:
    settings = SessionFile.read(fast.path)
    assert settings.session_config[KEY] == "4"
    assert settings.arithmetic == WORDS
    assert f"linears: {WORDS}; the file was checked at level 1" in fast.report.decisions


def test_the_deviation_is_that_of_the_session(fast: Compiled) -> None:
    """The check is exact at level 1; what level 4 changes stands beside it, as measured here."""
    parity = fast.report.parity
    assert float(parity["logits, relative"]) <= 1e-4
    (reported,) = (float(v) for name, v in parity.items() if "accuracy level 4" in name)
    assert reported > 1e-4
    settings = SessionFile.read(fast.path)
    found = {}
    for level in ("4", "1"):
        write_session_file(fast.path, replace(settings, session_config={KEY: level}))
        model = load(fast.path, threads=1)
        found[level], _ = model.step(IDS, model.start(2))
    write_session_file(fast.path, settings)
    error = np.abs(found["4"] - found["1"]).max() / np.abs(found["1"]).max()
    assert 0.2 * reported < error < 5 * reported  # of other tokens than the compiler's


def test_the_exact_level_is_the_default(tmp_path: Path) -> None:
    compiled = compile_toy(SMALL, quick("4-16-16"), tmp_path / "toy.onnx")
    settings = SessionFile.read(compiled.path)
    assert (settings.session_config[KEY], settings.arithmetic) == ("1", None)
    assert not any("accuracy level" in words for words in compiled.report.decisions)
    assert session_path(compiled.path).is_file()


@pytest.mark.parametrize("bits", ["4-8-8", "8-16-16", "16-16-16"])
def test_it_is_refused_where_nothing_would_follow(bits: str) -> None:
    message = f"matmulnbits_accuracy_level is 4, but at {bits} no linear runs in MatMulNBits"
    with pytest.raises(RecipeError, match=message):
        Recipe().override(bits=bits, matmulnbits_accuracy_level=4)


def test_it_travels_in_the_recipe() -> None:
    recipe = Recipe().override(bits="4-16-16", matmulnbits_accuracy_level=4)
    assert Recipe.from_toml(recipe.to_toml(), "elsewhere.toml") == recipe
    assert recipe.override(seed=1).weights.matmulnbits_accuracy_level == 4
    with pytest.raises(RecipeError, match=r"matmulnbits_accuracy_level is 2, expected one of 1"):
        Recipe().override(matmulnbits_accuracy_level=2)
