"""The scales of kept codes behind a linear: what stands in the graph while they are trained."""

from __future__ import annotations

from typing import TypeGuard

from torch import Tensor, nn

from fptq_compiler.graph.mean_shift import MeanShift
from fptq_compiler.quant.granularity import PerChannel
from fptq_compiler.quant.modules import WeightFakeQuantizer


class OutputScale(nn.Module):
    """From the outputs y (.., N) of a weight of kept codes to those that its scales now give."""

    def __init__(self, quantizer: WeightFakeQuantizer) -> None:
        """Take the quantiser, whose codes are kept with one scale an output channel."""
        super().__init__()
        self.quantizer = quantizer

    def forward(self, y: Tensor) -> Tensor:
        """The outputs of the weight that the quantiser gives."""
        return y * self.quantizer.scale_ratio()


class ScaledShift(nn.Module):
    """`MeanShift` of such a weight, without reading it: from a bias (N,) or None to the bias.

    Attributes:
        exact: (N,) float64, E[x] W.
        quantized: (N,) float64, E[x̂] W, of the scales with which W was coded.
    """

    def __init__(
        self, quantizer: WeightFakeQuantizer, weight: Tensor, shift: MeanShift
    ) -> None:
        """Take the quantiser, the coded weight (N, K), and the shift, with no map on its way."""
        super().__init__()
        assert len(shift.edges) == 0, "a map stands on the weight, and turns the mean"
        self.quantizer = quantizer
        exact, error = shift.get_buffer("mean"), shift.get_buffer("error")
        self.register_buffer("exact", weight.to(exact.dtype) @ exact)
        self.register_buffer("quantized", weight.to(exact.dtype) @ (exact + error))

    def forward(self, bias: Tensor | None = None) -> Tensor:
        """The bias in the dtype of the scales."""
        ratio = self.quantizer.scale_ratio()
        exact, quantized = self.get_buffer("exact"), self.get_buffer("quantized")
        shift = exact.to(ratio.dtype) - ratio * quantized.to(ratio.dtype)
        return shift if bias is None else bias + shift


def keeps_codes_by_row(module: nn.Module) -> TypeGuard[WeightFakeQuantizer]:
    """Whether it is a quantiser of kept codes with one scale a row (an output channel)."""
    return (
        isinstance(module, WeightFakeQuantizer)
        and module.coded_with is not None
        and isinstance(module.granularity, PerChannel)
    )
