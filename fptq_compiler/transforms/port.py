"""Where a map meets a parameter, and the one function that multiplies them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from fptq_compiler.transforms.map import Map, check_length


class Side(StrEnum):
    """Which side of a parameter the map touches."""

    OUT = "out"
    """The outputs of a linear layer: the rows of its weight, or its bias."""
    IN = "in"
    """The inputs of a linear layer: the columns of its weight."""
    TABLE = "table"
    """The last axis of a table: an embedding's (vocabulary, d), or what is added (…, d)."""


@dataclass(frozen=True)
class Port:
    """One parameter that a map is merged into.

    Attributes:
        parameter: its checkpoint name.
        side: which side the map touches.
        inverse_transpose: False where the activation sees T, True where it sees T⁻ᵀ.
        repeat: query heads that share one block of the map.
        start: first channel on that side, for a packed weight.
        stop: one past the last channel; None for the end.
    """

    parameter: str
    side: Side
    inverse_transpose: bool
    repeat: int = 1
    start: int = 0
    stop: int | None = None


def apply(map: Map, port: Port, weight: Tensor) -> Tensor:
    """The parameter after the map is merged into it; differentiable in both.

    Derivation (arXiv 2506.04985, section 3, in rows). A layer is y = x W + b with W (d_in,
    d_out), which torch keeps as W_t = Wᵀ. Let M be what the activation sees: M = T, or M = T⁻ᵀ
    where the port says so.
      OUT    y' = y M = x (W M) + b M, so W' = W M, W_t' = (W_tᵀ M)ᵀ and b' = b M.
      IN     x' = x M must give the same y: y = x' (M⁻¹ W), so W' = M⁻¹ W and W_t' = W_t M⁻ᵀ,
             which is W_t T⁻ᵀ for M = T and W_t T for M = T⁻ᵀ. The bias is untouched.
      TABLE  a row is an activation: E' = E M.
    So a site is: v out T, o in T; k out T, q out T⁻ᵀ; up out T, down in T; residual: table T,
    writers out T, readers in T.

    Args:
        map: T.
        port: where it goes; its name is not looked at, only quoted.
        weight: (out, in) or a bias (out,) for OUT, (out, in) for IN, (…, d) for TABLE.

    Returns:
        A contiguous tensor of the same shape and dtype.

    Raises:
        ValueError: the rank or the channel range does not fit the side or the map.
    """
    ranks = {Side.OUT: (1, 2), Side.IN: (2,), Side.TABLE: (1, 2, 3)}[port.side]
    if weight.ndim not in ranks:
        message = f"{port.parameter}: side {port.side} takes rank {ranks}, got {weight.ndim}"
        raise ValueError(message)
    axis = 0 if port.side is Side.OUT else weight.ndim - 1
    length = weight.shape[axis]
    stop = length if port.stop is None else port.stop
    if not 0 <= port.start < stop <= length:
        message = f"{port.parameter}: range {port.start}:{stop} is not inside {length} channels"
        raise ValueError(message)
    try:
        check_length(map, stop - port.start, port.repeat)
    except ValueError as error:
        message = f"{port.parameter}, side {port.side}: {error}"
        raise ValueError(message) from error
    touched = weight.narrow(axis, port.start, stop - port.start)
    transposed = weight.ndim == 2 and port.side is Side.OUT
    rows = touched.mT if transposed else touched
    inverse_transpose = port.inverse_transpose != (port.side is Side.IN)
    multiply = map.right_inverse_transpose if inverse_transpose else map.right
    merged = multiply(rows, port.repeat)
    merged = merged.mT if transposed else merged
    if stop - port.start == length:
        return merged.contiguous()
    before = weight.narrow(axis, 0, port.start)
    after = weight.narrow(axis, stop, length - stop)
    return torch.cat([before, merged, after], dim=axis)
