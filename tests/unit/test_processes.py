"""Processes that torchrun starts: what they refuse, and how they end together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.processes import die, fail, two_ranks
from tests.shop import Shop
from tests.training import STEPS, TRAINED


def test_a_batch_that_the_processes_cannot_share(
    shop: Shop, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    recipe = replace(TRAINED, training=replace(STEPS, batch=3))
    shop.fails(2, "training.batch is 3, which 2 processes cannot share", toy, recipe=recipe)


def test_weights_are_not_shared_by_one_process(shop: Shop, toy: Path) -> None:
    recipe = replace(TRAINED, training=replace(STEPS, sharded=True))
    shop.fails(2, "training.sharded is true, but there is one process", toy, recipe=recipe)


@pytest.mark.slow
def test_the_first_failure_is_the_exit_code_of_all(tmp_path: Path) -> None:
    two_ranks(fail, tmp_path)
    said = [(tmp_path / f"failed{r}").read_text() for r in (0, 1)]
    assert said[1] == "OptimizationError 4: not finite"
    assert said[0] == "RankError 4: rank 0 ends because rank 1 failed, which said why"


@pytest.mark.slow
def test_a_killed_rank_ends_the_others(tmp_path: Path) -> None:
    assert two_ranks(die, tmp_path)[1] == 9
    assert (tmp_path / "died0").read_text().startswith("RankError 1: rank 0 of 2 lost the others")
