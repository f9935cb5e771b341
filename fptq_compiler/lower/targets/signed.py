"""Activations in INT8 codes, which is what GPU providers multiply.

The program's codes count from 0; these are lower by half of the range, on the same grid.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import numpy_helper
from onnxscript import opset21 as op


def fake_quantize(x: Any, scale: float, zero_point: int, bits: int, role: str) -> Any:
    """QuantizeLinear and DequantizeLinear; 4-bit codes are clipped before they are rounded."""
    step = op.Constant(value_float=scale)
    lower = np.array(zero_point - (1 << (bits - 1)), np.int8)
    zero = op.Constant(value=numpy_helper.from_array(lower))
    if bits < 8:
        low = op.Constant(value_float=-zero_point * scale)
        high = op.Constant(value_float=((1 << bits) - 1 - zero_point) * scale)
        x = op.Clip(x, low, high)
    return op.DequantizeLinear(op.QuantizeLinear(x, step, zero), step, zero)
