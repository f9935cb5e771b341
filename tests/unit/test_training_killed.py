"""A compilation that is stopped from outside: what it says, and how it goes on."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fptq_compiler import driver
from fptq_compiler.optimize import training
from fptq_compiler.optimize.training_state import KEEP_EVERY
from tests.conftest import REPOSITORY
from tests.shop import Shop
from tests.training import STEPS, TRAINED, last_values, same_values

SECONDS = 300  # until the first state is kept, on a slow machine
RECIPE = replace(TRAINED, training=replace(STEPS, steps=2 * KEEP_EVERY))


@pytest.mark.slow
def test_a_killed_compilation_goes_on_to_the_same_file(
    shop: Shop, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, folder = shop.folder / "whole", shop.folder / "work"
    assert shop.compile(toy, "--work-dir", whole, recipe=RECIPE) == 0, shop.said
    uninterrupted = shop.output.read_bytes()
    for path in shop.output.parent.iterdir():
        path.unlink()
    kill_when_a_state_is_kept(shop, toy, folder)
    assert not shop.output.exists()
    (state,) = folder.glob("training-*.pt")
    kept = torch.load(state)["step"]
    assert kept >= KEEP_EVERY

    steps = []
    average = training.average_gradients
    monkeypatch.setattr(
        training, "average_gradients", lambda found: (steps.append(1), average(found))
    )
    assert shop.compile(toy, "--work-dir", folder, recipe=RECIPE) == 0, shop.said
    assert len(steps) == RECIPE.training.steps - kept
    assert same_values(last_values(folder), last_values(whole))
    assert shop.output.read_bytes() == uninterrupted


def kill_when_a_state_is_kept(shop: Shop, toy: Path, folder: Path) -> None:
    """Run fptq-compile on the shop's recipe, and kill it with SIGKILL in its training."""
    words = [toy, "-o", shop.output, "--recipe", shop.folder / "recipe.toml", "--work-dir", folder]
    process = subprocess.Popen(
        [sys.executable, "-m", "fptq_compiler", *map(str, words)], cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL,
    )
    until = time.monotonic() + SECONDS
    while process.poll() is None and time.monotonic() < until:
        if list(folder.glob("training-*.pt")):
            break
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -9


def test_an_interrupt_says_how_to_go_on(
    shop: Shop, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(driver, "capture", interrupt)
    shop.fails(130, "nothing was written; a compilation with --work-dir DIR goes on", toy)
    folder = shop.folder / "work"
    shop.fails(130, f"the same command goes on from what {folder} holds", toy,
               "--work-dir", folder)
