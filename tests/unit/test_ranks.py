"""Two processes train as one does, and share its weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.processes import two_ranks
from tests.ranks import Gradients, train
from tests.training import same_values, train_toy

pytestmark = pytest.mark.slow  # each process imports torch

RELATIVE = 1e-4
"""Of a gradient's largest value: float32 sums of two rows apart, and of both in one product."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks found; the folder holds what they wrote."""
    folder = tmp_path_factory.mktemp("ranks")
    assert two_ranks(train, folder) == [0, 0]
    return [{**torch.load(folder / f"found{r}.pt"), "folder": folder} for r in (0, 1)]


def assert_same_gradients(made: dict[str, Any], expected: dict[str, Any]) -> None:
    assert made["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert made["found"].keys() == expected["found"].keys()
    for name, gradient in expected["found"].items():
        tolerance = RELATIVE * float(gradient.abs().max())
        torch.testing.assert_close(
            made["found"][name], gradient, rtol=0, atol=tolerance,
            msg=lambda words, name=name: f"{name}: {words}",
        )


@pytest.mark.parametrize("kind", ["plain", "sharded", "checkpointed"])
def test_two_processes_give_the_gradients_of_one(found: list[dict[str, Any]], kind: str) -> None:
    alone = Gradients.of_toy()
    assert any(float(g.abs().max()) > 0 for g in alone["found"].values())
    for made in found:
        assert_same_gradients(made[kind], alone)


@pytest.mark.parametrize("kind", ["sharded", "checkpointed"])
def test_a_rank_holds_half_of_the_frozen_weights(found: list[dict[str, Any]], kind: str) -> None:
    for made in found:
        share = made[kind]["resident"] / made["plain"]["resident"]
        assert 0.45 < share < 0.55  # rows that two do not divide go to the first
        assert made[kind]["gathered"] == 0


def test_both_ranks_end_with_the_same_values(found: list[dict[str, Any]]) -> None:
    first, second = found
    assert same_values(first["values"], second["values"])
    assert first["losses"] == second["losses"]
    assert first["losses"] == pytest.approx(train_toy()[1], rel=1e-3)  # of rounded values


def test_the_first_rank_alone_keeps_the_state(found: list[dict[str, Any]]) -> None:
    kept = [path.name for path in found[0]["folder"].glob("kept*")]
    assert kept == ["kept0.pt"]
