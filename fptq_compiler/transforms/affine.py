"""Any invertible matrix per block, by its singular values: T_v of arXiv 2506.04985."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fptq_compiler.transforms.dense import DenseBlocks
from fptq_compiler.transforms.map import normal_
from fptq_compiler.transforms.rotation import Rotation


class Affine(DenseBlocks):
    """M = U diag(exp(sigma)) Vᵀ per block, with U and V rotations: never singular.

    M⁻ᵀ = U diag(exp(-sigma)) Vᵀ is built from the same factors, so no matrix is ever inverted.

    Attributes:
        left: U, starting at the base where one is given.
        other: V, starting at the identity.
        sigma: (blocks, block), natural logarithms of the singular values.
    """

    commutes_with = "token mixing"

    def __init__(self, blocks: int, block: int, base: Tensor | None = None) -> None:
        """Start at the identity, or at `base` (orthogonal; shape as for `Rotation`)."""
        super().__init__(blocks * block, blocks)
        self.left = Rotation(self.size, blocks, base)
        self.other = Rotation(self.size, blocks)
        self.sigma = nn.Parameter(torch.zeros(blocks, block))

    def _build(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        left, _ = self.left.dense(dtype)
        other, _ = self.other.dense(dtype)
        sigma = self.sigma.to(dtype).unsqueeze(-2)
        return (left * sigma.exp()) @ other.mT, (left * (-sigma).exp()) @ other.mT

    @torch.no_grad()
    def randomize_(self, generator: torch.Generator, strength: float) -> None:
        """Randomise U and V, and draw sigma from N(0, (strength / 2)²)."""
        super().randomize_(generator, strength)
        normal_(self.sigma, generator, strength / 2)
