"""Batches: each sequence once an epoch, held-out ones never, the same from the seed and step."""

import pytest
import torch
from torch import Tensor

from fptq_compiler.errors import OptimizationError
from fptq_compiler.optimize.batches import Batches


def rows(count: int) -> Tensor:
    """Sequences that are told apart by each of their tokens."""
    return torch.arange(count).unsqueeze(1).expand(count, 5)


def seen(batches: Batches, steps: range) -> list[int]:
    return [int(row[0]) for step in steps for row in batches.at(step)]


@pytest.mark.parametrize("size", [1, 3, 7])
def test_an_epoch_sees_every_row_once(size: int) -> None:
    batches = Batches.split(rows(24), held_out=3, size=size, seed=4)
    assert [len(batches.rows), len(batches.held_out)] == [21, 3]
    epoch = 21 // size
    first, second = seen(batches, range(epoch)), seen(batches, range(epoch, 2 * epoch))
    assert sorted(first) == sorted(second) == list(range(21))
    assert first != second


def test_held_out_rows_are_the_last_and_never_trained() -> None:
    batches = Batches.split(rows(40), held_out=4, size=4, seed=0)
    assert batches.held_out[:, 0].tolist() == [36, 37, 38, 39]
    assert set(seen(batches, range(30))).isdisjoint([36, 37, 38, 39])


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    one, two, other = (Batches.split(rows(30), held_out=2, size=4, seed=s) for s in (1, 1, 2))
    assert torch.equal(one.at(11), two.at(11))
    assert seen(one, range(6)) == seen(two, range(6))
    assert seen(one, range(6)) != seen(other, range(6))


def test_a_batch_may_be_larger_than_an_epoch() -> None:
    batches = Batches.split(rows(3), held_out=1, size=5, seed=0)
    assert batches.at(0).shape == (5, 5)
    assert set(seen(batches, range(2))) == {0, 1}


def test_no_more_than_one_row_in_eight_is_held_out() -> None:
    assert len(Batches.split(rows(17), held_out=8, size=1, seed=0).held_out) == 2
    assert len(Batches.split(rows(2), held_out=8, size=1, seed=0).held_out) == 1


def test_one_sequence_is_too_few() -> None:
    with pytest.raises(OptimizationError, match="has 1 sequence of 5 tokens, expected one to"):
        Batches.split(rows(1), held_out=1, size=1, seed=0)
