"""Quantisers as modules: what stands in the graph while ranges are found and trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fptq_compiler.quant.granularity import PerBlock, PerChannel
from fptq_compiler.quant.grid import Grid, fake_quantize, quantize, round_zero_point


class ActivationFakeQuantizer(nn.Module):
    """Static per-tensor asymmetric quantiser of an activation.

    Attributes:
        scale: () float32, positive.
        zero_point: () float32, rounded into the grid where it is used.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.grid = Grid(bits, symmetric=False)
        self.scale = nn.Parameter(torch.ones(()))
        self.zero_point = nn.Parameter(torch.zeros(()))

    def set_range(self, scale: Tensor, zero_point: Tensor) -> None:
        """Take a range as `quant.ranges.activation_range` gives it."""
        with torch.no_grad():
            self.scale.copy_(scale)
            self.zero_point.copy_(zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """`x` on the grid, with straight-through gradients."""
        zero_point = round_zero_point(self.zero_point, self.grid)
        return fake_quantize(x, self.scale, zero_point, self.grid)


class WeightFakeQuantizer(nn.Module):
    """Symmetric quantiser of a weight (rows, columns): one scale a row, or a block of columns.

    Attributes:
        scale: (rows,) or (rows, ceil(columns / block)) float32, positive.
    """

    def __init__(self, bits: int, shape: torch.Size, block: int = 0) -> None:
        super().__init__()
        self.grid = Grid(bits, symmetric=True)
        self.granularity = PerBlock(1, block) if block else PerChannel(0)
        self.scale = nn.Parameter(torch.ones(self.granularity.scale_shape(shape)))

    def set_scale(self, scale: Tensor) -> None:
        """Take a scale as `quant.ranges.weight_scale` gives it."""
        with torch.no_grad():
            self.scale.copy_(scale)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight on the grid, with straight-through gradients."""
        scale = self.granularity.expand(self.scale, weight.shape)
        return fake_quantize(weight, scale, None, self.grid)

    def codes(self, weight: Tensor) -> Tensor:
        """Integer codes (rows, columns), int8."""
        scale = self.granularity.expand(self.scale, weight.shape)
        return quantize(weight.float(), scale, None, self.grid).to(torch.int8)
