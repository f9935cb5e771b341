"""Signal to quantisation noise."""

from __future__ import annotations

from math import inf, log10

import torch
from torch import Tensor


def sqnr(x: Tensor, x_hat: Tensor) -> float:
    """10 log10(Σ x² / Σ (x - x̂)²) in decibel, summed in float64; infinite without noise.

    Raises:
        ValueError: the shapes differ.
    """
    if x.shape != x_hat.shape:
        message = f"x and x_hat differ in shape: {tuple(x.shape)} and {tuple(x_hat.shape)}"
        raise ValueError(message)
    exact = x.detach().to(torch.float64)
    signal = float(exact.square().sum())
    noise = float((exact - x_hat.detach().to(torch.float64)).square().sum())
    if noise == 0.0:
        return inf
    return 10.0 * log10(signal / noise) if signal > 0.0 else -inf
