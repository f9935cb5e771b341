"""A positive scale per channel: T_u of arXiv 2506.04985."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fptq_compiler.transforms.map import Map, normal_


class Diagonal(Map):
    """M = diag(exp(log_scale)), starting at the identity.

    Commutes with the elementwise product with the gate: (gate * up) M = gate * (up M).

    Attributes:
        log_scale: (size,), natural logarithm of the scale; always positive and invertible.
    """

    commutes_with = "elementwise product with the gate"

    def __init__(self, size: int, blocks: int = 1) -> None:
        super().__init__(size, blocks)
        self.log_scale = nn.Parameter(torch.zeros(size))

    def _scale(self, x: Tensor, sign: int) -> Tensor:
        return (sign * self.log_scale.to(x.dtype)).exp().view(self.blocks, 1, self.block)

    def _multiply(self, x: Tensor) -> Tensor:
        return x * self._scale(x, 1)

    def _multiply_inverse(self, x: Tensor) -> Tensor:
        return x * self._scale(x, -1)

    _multiply_inverse_transpose = _multiply_inverse

    @torch.no_grad()
    def randomize_(self, generator: torch.Generator, strength: float) -> None:
        """Draw log_scale from N(0, strength²)."""
        normal_(self.log_scale, generator, strength)
