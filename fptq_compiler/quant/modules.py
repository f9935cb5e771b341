"""Quantisers as modules: what stands in the graph while ranges are found and trained."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from fptq_compiler.quant.granularity import PerBlock, PerChannel
from fptq_compiler.quant.grid import Grid, fake_quantize, quantize, round_zero_point

CHUNK = 1 << 22


class ActivationFakeQuantizer(nn.Module):
    """Static quantiser of an activation, asymmetric and per tensor if nothing else is said.

    Attributes:
        scale: float32, positive; () per tensor, (1, H, 1, D) per channel of (B, H, S, D).
        zero_point: () float32, rounded into the grid where it is used.
    """

    def __init__(
        self, bits: int, *, symmetric: bool = False, scale_shape: Sequence[int] = ()
    ) -> None:
        super().__init__()
        self.grid = Grid(bits, symmetric=symmetric)
        self.scale = nn.Parameter(torch.ones(tuple(scale_shape)))
        self.zero_point = nn.Parameter(torch.zeros(()))

    def set_range(self, scale: Tensor, zero_point: Tensor) -> None:
        """Take a range as `quant.ranges` gives it."""
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
        coded_with: the scale of a weight whose codes stand; None where it is rounded anew.
    """

    coded_with: Tensor | None

    def __init__(self, bits: int, shape: torch.Size, block: int = 0) -> None:
        super().__init__()
        self.register_buffer("coded_with", None)
        self.grid = Grid(bits, symmetric=True)
        self.granularity = PerBlock(1, block) if block else PerChannel(0)
        self.scale = nn.Parameter(torch.ones(self.granularity.scale_shape(shape)))

    def set_scale(self, scale: Tensor) -> None:
        """Take a scale as `quant.ranges.weight_scale` gives it."""
        with torch.no_grad():
            self.scale.copy_(scale)

    def keep_codes(self) -> None:
        """The weight is codes times this scale: from here on the same codes times any scale."""
        self.coded_with = self.scale.detach().clone()

    def scale_ratio(self) -> Tensor:
        """The scale by that of the kept codes, in its shape."""
        assert self.coded_with is not None, "the weight is rounded anew"
        return self.scale / self.coded_with

    def forward(self, weight: Tensor) -> Tensor:
        """The weight on the grid, with straight-through gradients, or exact ones of kept codes."""
        if self.coded_with is not None:
            return weight * self.granularity.expand(self.scale_ratio(), weight.shape)
        scale = self.granularity.expand(self.scale, weight.shape)
        return fake_quantize(weight, scale, None, self.grid)

    @torch.no_grad()
    def codes(self, weight: Tensor) -> Tensor:
        """Integer codes (rows, columns), int8."""
        found = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        held = self.scale if self.coded_with is None else self.coded_with
        for rows, scale in self._chunks(weight, held):
            found[rows] = quantize(weight[rows].float(), scale, None, self.grid).to(torch.int8)
        return found

    @torch.no_grad()
    def sqnr(self, weight: Tensor) -> float:
        """Signal-to-noise ratio of the quantised weight in dB."""
        signal = noise = 0.0
        for rows, scale in self._chunks(weight, self.scale):
            exact = weight[rows].float()
            error = fake_quantize(exact, scale, None, self.grid) - exact
            signal += float(exact.double().square().sum())
            noise += float(error.double().square().sum())
        return 10.0 * math.log10(signal / noise) if signal > 0 and noise > 0 else math.inf

    def _chunks(self, weight: Tensor, scales: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Row ranges of at most CHUNK values, each with its `scales`, shaped as `scale`."""
        step = max(1, CHUNK // weight.shape[1])
        for start in range(0, weight.shape[0], step):
            rows = slice(start, start + step)
            shape = weight[rows].shape
            yield rows, self.granularity.expand(scales[rows], shape)
