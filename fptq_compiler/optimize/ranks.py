"""Data-parallel training under `torchrun`: every rank runs its rows, gradients are averaged.

Without a process group there is one rank, and nothing happens.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fptq_compiler.errors import OptimizationError


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
    dist.all_reduce(total)
    return float(total) / ranks()


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
