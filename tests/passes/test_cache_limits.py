"""A cache is at most as long as the export and its tables of positions allow."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.export import Dim

from fptq_compiler import driver
from fptq_compiler.errors import UnsupportedModelError
from fptq_compiler.passes.add_cache import AddCache
from fptq_compiler.recipe_parts import CacheRecipe
from fptq_compiler.runtime.session_file import SessionFile
from tests.compiling import compile_toy, quick
from tests.passes.learned_positions import Learned, learned
from tests.passes.steps import ONE, run
from tests.toys import MAX_POSITIONS, ToyConfig, make_tokens

CACHED = quick("16-16-16", cache=CacheRecipe(enabled=True))


def test_a_table_of_positions_that_is_too_short() -> None:
    program = learned("default")
    with pytest.raises(UnsupportedModelError, match="its table has 64 positions") as caught:
        run(program, AddCache(MAX_POSITIONS + 1))
    assert "give --max-length 64" in str(caught.value)


def test_the_length_is_bounded_by_the_export(tmp_path: Path) -> None:
    """Tables of angles as buffers are as long as that, and so is a table of positions."""
    compile_toy(ToyConfig(rope="complex", layers=1), CACHED, tmp_path / "toy.onnx")
    assert SessionFile.read(tmp_path / "toy.onnx").context_length == MAX_POSITIONS


def test_a_longer_cache_than_the_export_allows(tmp_path: Path) -> None:
    sizes = ({0: Dim("batch"), 1: Dim("sequence", max=64)},)
    tokens = (make_tokens(ONE, 2, 7),)
    exported = torch.export.export(Learned(), tokens, dynamic_shapes=sizes, strict=False)
    recipe = quick("16-16-16", cache=CacheRecipe(enabled=True, max_length=65))
    with pytest.raises(UnsupportedModelError, match="exported for at most 64 tokens"):
        driver.compile_model(
            exported, tmp_path / "toy.onnx", options=driver.Options(recipe=recipe)
        )
