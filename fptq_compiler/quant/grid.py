"""The integer grid and the one quantiser: training, freezing and the runtime agree bit for bit.

Codes are clamp(round_half_even(x / scale) + zero_point), as ONNX QuantizeLinear computes them in
float32: a true division (a product with 1 / scale differs on near ties), ties to even, saturation
after the zero-point is added.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """An integer grid.

    Attributes:
        bits: width of a code, 2 to 16.
        symmetric: signed with zero-point 0 if true, else unsigned with a free zero-point.
    """

    bits: int
    symmetric: bool

    def __post_init__(self) -> None:
        """Check the width.

        Raises:
            ValueError: bits are not 2 to 16.
        """
        if not 2 <= self.bits <= 16:
            message = f"a grid has 2 to 16 bits, got {self.bits}"
            raise ValueError(message)

    @property
    def lowest(self) -> int:
        """The lowest code: -2^(bits - 1), or 0 if asymmetric."""
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def highest(self) -> int:
        """The highest code: 2^(bits - 1) - 1, or 2^bits - 1 if asymmetric."""
        return (1 << (self.bits - 1)) - 1 if self.symmetric else (1 << self.bits) - 1


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
    """Integer-valued codes of x. Not differentiable to any use; see `fake_quantize`.

    Args:
        x: any shape, floating; float64 is computed in float64, all else in float32.
        scale: positive, broadcastable to x.
        zero_point: integer-valued in the grid, broadcastable to x; None for 0.
        grid: the codes allowed.

    Returns:
        Codes in the shape and dtype of x.

    Raises:
        ValueError: the dtype of x cannot hold all codes of the grid, or is not floating.
    """
    _check_dtype(x)
    if 2.0 / torch.finfo(x.dtype).eps < 1 << grid.bits:
        message = f"{x.dtype} cannot hold codes of {grid.bits} bits; cast x to float32 first"
        raise ValueError(message)
    dtype = _compute_dtype(x)
    zero = _zero_point(zero_point, scale)
    return _codes(x.to(dtype), _cast(scale, x), _cast(zero, x), grid).to(x.dtype)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """(codes - zero_point) * scale, as ONNX DequantizeLinear.

    Args:
        codes: integer-valued, of an integer or floating dtype.
        scale: positive, broadcastable to codes.
        zero_point: integer-valued, broadcastable to codes; None for 0.

    Returns:
        In the dtype of the codes if that is floating, else in that of the scale.
    """
    target = codes.dtype if codes.dtype.is_floating_point else scale.dtype
    dtype = torch.float64 if target == torch.float64 else torch.float32
    zero = _zero_point(zero_point, scale).to(codes.device, dtype)
    return ((codes.to(dtype) - zero) * scale.to(codes.device, dtype)).to(target)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
    """The value of dequantize(quantize(x)), bit for bit, with gradients to all three.

    Straight-through for x inside the range, zero outside. To scale and zero-point the gradients
    of LSQ (arXiv 1902.08153) and LSQ+ (arXiv 2004.09576), without their gradient scaling:
    inside, d x̂ / d scale = round(x / scale) - x / scale and d x̂ / d zero_point = 0; outside,
    code - zero_point and -scale.

    Args:
        x: any shape, floating.
        scale: positive, broadcastable to x.
        zero_point: integer-valued in the grid (see `round_zero_point`); None for 0.
        grid: the codes allowed.

    Returns:
        The shape and dtype of x.

    Raises:
        ValueError: x is not floating.
    """
    _check_dtype(x)
    zero = _zero_point(zero_point, scale)
    y: Tensor = _FakeQuantize.apply(  # type: ignore[no-untyped-call]
        x.to(_compute_dtype(x)), _cast(scale, x), _cast(zero, x), grid
    )
    return y.to(x.dtype)


def round_zero_point(zero_point: Tensor, grid: Grid) -> Tensor:
    """A trained zero-point rounded half to even into the grid; its gradient is passed through."""
    rounded: Tensor = _RoundInto.apply(zero_point, grid)  # type: ignore[no-untyped-call]
    return rounded


def _check_dtype(x: Tensor) -> None:
    if not x.dtype.is_floating_point:
        message = f"only floating-point tensors are quantised, got {x.dtype}"
        raise ValueError(message)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _cast(parameter: Tensor, x: Tensor) -> Tensor:
    # Moved to the device of x: a division by a host scalar becomes a product on some devices.
    return parameter.to(x.device, _compute_dtype(x))


def _zero_point(zero_point: Tensor | None, scale: Tensor) -> Tensor:
    return scale.new_zeros(()) if zero_point is None else zero_point


def _codes(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    codes = torch.div(x, scale).round_().add_(zero_point)
    return codes.clamp_(grid.lowest, grid.highest)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.grid = grid
        return _codes(x, scale, zero_point, grid).sub_(zero_point).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0]
        x, scale, zero_point = ctx.saved_tensors
        grid: Grid = ctx.grid
        scaled = torch.div(x, scale)
        codes = scaled.round().add_(zero_point)
        to_x = _inside(gradient, codes, grid)
        to_scale = to_zero_point = None
        if ctx.needs_input_grad[1]:
            clamped = codes.clamp(grid.lowest, grid.highest).sub_(zero_point)
            slope = clamped.sub_(_inside(scaled, codes, grid))
            to_scale = slope.mul_(gradient).sum_to_size(scale.shape)
        if ctx.needs_input_grad[2]:
            to_zero_point = (to_x - gradient).mul_(scale).sum_to_size(zero_point.shape)
        return to_x, to_scale, to_zero_point, None


def _inside(values: Tensor, codes: Tensor, grid: Grid) -> Tensor:
    """The values where the code lies on the grid, else 0.

    As ATen's derivative of a clamp, which has no booleans: on a CPU they cost thirty times more.
    """
    kept: Tensor = torch.ops.aten.hardtanh_backward(
        values, codes, grid.lowest - 0.5, grid.highest + 0.5
    )
    return kept


class _RoundInto(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, zero_point: Tensor, grid: Grid) -> Tensor:
        return zero_point.round().clamp_(grid.lowest, grid.highest)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None
