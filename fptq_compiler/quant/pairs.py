"""INT4 codes two to a byte: the code plus 8, the even channel in the low half."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_pairs(codes: Tensor) -> Tensor:
    """INT4 codes (..., D) as UINT8 (..., D / 2)."""
    shifted = (codes + 8).to(torch.uint8)
    return shifted[..., 0::2] | (shifted[..., 1::2] << 4)


def unpack_pairs(packed: Tensor) -> Tensor:
    """UINT8 (..., D / 2) as INT4 codes (..., D) in INT8."""
    pairs = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
    return pairs.to(torch.int8) - 8
