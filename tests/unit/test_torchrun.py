"""`torchrun -m fptq_compiler`: one file, one summary, one exit."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fptq_compiler.recipe import Recipe
from tests.conftest import REPOSITORY
from tests.training import STEPS, TRAINED


def torchrun(folder: Path, model: Path, recipe: Recipe) -> subprocess.CompletedProcess[str]:
    """Compile a model with two processes, with every option that writes something."""
    (folder / "recipe.toml").write_text(recipe.to_toml(), encoding="utf-8")
    (folder / "out").mkdir()
    words = [
        "--standalone", "--nproc-per-node=2", "-m", "fptq_compiler", model,
        "-o", folder / "out" / "toy.onnx", "--recipe", folder / "recipe.toml",
        "--report", folder / "out" / "report.json", "--work-dir", folder / "work",
    ]
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *map(str, words)], cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_the_first_rank_alone_writes_and_speaks(
    tmp_path: Path, toy: Path, *, sharded: bool
) -> None:
    recipe = replace(TRAINED, training=replace(STEPS, sharded=sharded))
    done = torchrun(tmp_path, toy, recipe)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "report.json", "toy.onnx", "toy.onnx.session.json"
    ]
    kept = sorted(path.name.partition("-")[0] for path in (tmp_path / "work").iterdir())
    assert kept == ["calibration", "maps", "training"]
    assert done.stderr.count("end-to-end training: 5 steps of 2 x 8 tokens") == 2  # begins, ends


@pytest.mark.slow
def test_an_error_ends_both(tmp_path: Path, toy: Path) -> None:
    recipe = replace(TRAINED, training=replace(STEPS, batch=3))
    done = torchrun(tmp_path, toy, recipe)
    assert done.returncode != 0
    assert "training.batch is 3, which 2 processes cannot share" in done.stderr
    assert "exitcode  : 2" in done.stderr  # of each process, as torchrun tells it
    assert not list((tmp_path / "out").iterdir())
