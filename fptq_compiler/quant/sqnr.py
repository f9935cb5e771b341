"""Signal to quantisation noise."""

from __future__ import annotations

from math import inf, log10

import torch
from torch import Tensor

CHUNK = 1 << 22
"""Values taken to float64 at once."""


def sqnr(x: Tensor, x_hat: Tensor) -> float:
    """10 log10(Σ x² / Σ (x - x̂)²) in decibel, summed in float64; infinite without noise.

    Raises:
        ValueError: the shapes differ.
    """
    if x.shape != x_hat.shape:
        message = f"x and x_hat differ in shape: {tuple(x.shape)} and {tuple(x_hat.shape)}"
        raise ValueError(message)
    signal = noise = 0.0
    pieces = (torch.split(values.detach().flatten(), CHUNK) for values in (x, x_hat))
    for exact, quantized in zip(*pieces, strict=True):
        signal += float(exact.double().square().sum())
        noise += float((exact.double() - quantized.double()).square().sum())
    if noise == 0.0:
        return inf
    return 10.0 * log10(signal / noise) if signal > 0.0 else -inf
