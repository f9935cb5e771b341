"""Trainable orthogonal matrices, by the Cayley map: T_r of arXiv 2506.04985."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor, nn

from fptq_compiler.transforms.dense import DenseBlocks
from fptq_compiler.transforms.map import normal_


class Rotation(DenseBlocks):
    """M = base @ Cayley(A) per block, with A skew-symmetric: orthogonal by construction.

    Cayley(A) = (1 - A)⁻¹ (1 + A). Starts at `base` (A = 0). M⁻¹ = Mᵀ, so M⁻ᵀ is M itself.

    Attributes:
        skew: (blocks, block, block); only the strict upper triangle is read, A = skew - skewᵀ.
        base: (1 or blocks, block, block) float64, fixed and orthogonal; absent for the identity.
    """

    commutes_with = "RMSNorm without gain, token mixing"
    exact_buffers: tuple[str, ...] = ("base",)
    base: Tensor | None

    def __init__(self, size: int, blocks: int = 1, base: Tensor | None = None) -> None:
        """Start at the identity, or at `base`.

        Args:
            size: channels in all.
            blocks: equal diagonal blocks.
            base: (block, block) or (blocks, block, block), orthogonal to 1e-3; it is polished to
                float64 precision.

        Raises:
            ValueError: the base has another shape or is not orthogonal.
        """
        super().__init__(size, blocks)
        self.skew = nn.Parameter(torch.zeros(blocks, self.block, self.block))
        if base is None:
            self.exact_buffers = ()
            self.base = None
        else:
            self.register_buffer("base", _polished_base(base, blocks, self.block))

    def _build(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        matrices = cayley(self.skew.to(dtype))
        if self.base is not None:
            matrices = self.base.to(dtype) @ matrices
        return matrices, matrices

    @torch.no_grad()
    def randomize_(self, generator: torch.Generator, strength: float) -> None:
        """Draw A such that its spectral norm is about 2 * strength for large blocks."""
        normal_(self.skew, generator, strength / sqrt(self.block))


def cayley(upper: Tensor) -> Tensor:
    """(1 - A)⁻¹ (1 + A) with A the skew matrix of the strict upper triangle of `upper`.

    1 - A is always invertible since the eigenvalues of A are imaginary. Any rotation without the
    eigenvalue -1 is reached.

    Args:
        upper: (..., n, n), float32 or float64.

    Returns:
        (..., n, n), orthogonal with determinant 1.
    """
    triangle = upper.triu(1)
    skew = triangle - triangle.mT
    one = torch.eye(upper.shape[-1], dtype=upper.dtype, device=upper.device)
    rotation: Tensor = torch.linalg.solve(one - skew, one + skew)
    return rotation


def _polished_base(base: Tensor, blocks: int, block: int) -> Tensor:
    """The base in float64, made orthogonal to its precision by Newton-Schulz steps."""
    if base.shape not in {(block, block), (1, block, block), (blocks, block, block)}:
        message = f"base must be ({block}, {block}) or one per block, got {tuple(base.shape)}"
        raise ValueError(message)
    matrices = base.detach().to(torch.float64).reshape(-1, block, block)
    one = torch.eye(block, dtype=torch.float64, device=base.device)
    error = float((matrices.mT @ matrices - one).abs().max())
    if not error < 1e-3:
        message = f"base must be orthogonal, its Gram matrix is {error:.1e} off the identity"
        raise ValueError(message)
    steps = 0 if error < 1e-13 else 3  # quadratic: 1e-3, 1e-6, 1e-12, below the precision
    for _ in range(steps):
        matrices = matrices @ (1.5 * one - 0.5 * (matrices.mT @ matrices))
    return matrices.clone()
