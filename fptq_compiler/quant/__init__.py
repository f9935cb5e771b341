"""The runtime's quantiser, its ranges and their granularity: torch only, no graph."""

from __future__ import annotations

from fptq_compiler.quant.granularity import Granularity, PerBlock, PerChannel, PerTensor
from fptq_compiler.quant.grid import (
    Grid,
    dequantize,
    fake_quantize,
    quantize,
    round_zero_point,
)
from fptq_compiler.quant.ranges import (
    activation_range,
    channel_scale,
    minmax_range,
    minmax_scale,
    weight_scale,
)
from fptq_compiler.quant.sqnr import sqnr

__all__ = [
    "Granularity",
    "Grid",
    "PerBlock",
    "PerChannel",
    "PerTensor",
    "activation_range",
    "channel_scale",
    "dequantize",
    "fake_quantize",
    "minmax_range",
    "minmax_scale",
    "quantize",
    "round_zero_point",
    "sqnr",
    "weight_scale",
]
