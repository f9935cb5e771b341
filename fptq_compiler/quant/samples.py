"""Fewer samples that stand for all of them, extremes included."""

from __future__ import annotations

import torch
from torch import Tensor


def thin(values: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """At most about `limit` weighted values: sums over them estimate sums over all.

    The limit / 16 least and largest values are kept as they are; what lies strictly between is
    taken at a regular stride, each weighing as many as it stands for. Values equal to the
    boundary between the two (half of them, after a ReLU) are one value with their count.
    Deterministic: no random number is drawn.

    Args:
        values: (n,) float32, finite, n >= 1.
        limit: at least 32.

    Returns:
        (values, weights), float32 of one shape; the weights add to n.
    """
    count = values.numel()
    if count <= limit:
        return values, torch.ones_like(values)
    kept = limit // 16
    low = values.kthvalue(kept).values
    high = values.kthvalue(count - kept + 1).values
    between = values[(values > low) & (values < high)]
    pieces = [values[values < low], values[values > high], low[None]]
    weights = [torch.ones_like(pieces[0]), torch.ones_like(pieces[1]), (values == low).sum()[None]]
    if bool(high > low):
        pieces.append(high[None])
        weights.append((values == high).sum()[None])
    if between.numel():
        stride = -(-between.numel() // (limit - 2 * kept))
        taken = between[::stride]
        pieces.append(taken)
        weights.append(torch.full_like(taken, between.numel() / taken.numel()))
    return torch.cat(pieces), torch.cat([weight.to(values.dtype) for weight in weights])
