"""Data-parallel training under `torchrun`: every rank runs its rows, gradients are averaged.

Without a process group there is one rank, and nothing happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fptq_compiler.errors import OptimizationError, RankError

Value = TypeVar("Value")


def rank() -> int:
    """The number of this process, 0 where it is alone."""
    return dist.get_rank() if _several() else 0


def ranks() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _several() else 1


def rows_of_rank(batch: Tensor) -> Tensor:
    """The rows of a batch (B, S) that this rank runs, as many as every other.

    Raises:
        OptimizationError: the ranks do not divide the batch.
    """
    if batch.shape[0] % ranks():
        message = (
            f"a batch of {batch.shape[0]} sequences cannot be shared by {ranks()} processes; "
            "give a multiple by [training] batch"
        )
        raise OptimizationError(message)
    return batch[rank() :: ranks()]


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the ranks, all in one message."""
    if not _several():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    with _all_answer():
        dist.all_reduce(flat)
    flat /= ranks()
    parts = torch.split(flat, [g.numel() for g in gradients])
    for gradient, mean in zip(gradients, parts, strict=True):
        gradient.copy_(mean.view_as(gradient))


def mean_over_ranks(value: Tensor) -> float:
    """The mean of a number [] that every rank has."""
    if not _several():
        return float(value)
    total = value.clone()
    with _all_answer():
        dist.all_reduce(total)
    return float(total) / ranks()


def mean_over_rows(function: Callable[[Tensor], Tensor], rows: Tensor) -> float:
    """The mean of a number [] of every row (1, S) of (M, S); each rank computes its share.

    All compute as many, for they may have to meet inside the function; what is over counts
    nothing.
    """
    count = rows.shape[0]
    places = range(rank(), -(-count // ranks()) * ranks(), ranks())
    found = [function(rows[i % count].unsqueeze(0)) * float(i < count) for i in places]
    return mean_over_ranks(torch.stack(found).double().sum()) * ranks() / count


def from_first_rank(value: Value) -> Value:
    """What rank 0 has, on every rank."""
    if not _several():
        return value
    boxes = [value]
    with _all_answer():
        dist.broadcast_object_list(boxes)
    return boxes[0]


def copy_from_first_rank(values: Iterable[Tensor]) -> None:
    """Give tensors the values that they have on rank 0."""
    if not _several():
        return
    with _all_answer():
        for value in values:
            dist.broadcast(value, 0)


def leave_ranks() -> bool:
    """End the process group; gives whether this process is the one that goes on alone."""
    goes_on = rank() == 0
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    return goes_on


@contextmanager
def _all_answer() -> Iterator[None]:
    """Raise RankError where another rank ended, or is silent for too long."""
    try:
        yield
    except RuntimeError as error:
        message = (
            f"rank {rank()} of {ranks()} lost the others: one of them ended (killed, or out of "
            "memory?) or did not answer in time; start the same command again, which goes on "
            "where it stood if it has --work-dir"
        )
        raise RankError(message) from error


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
