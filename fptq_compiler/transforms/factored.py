"""Maps as a scale and Kronecker factors, the form in which they are computed at run time."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from fptq_compiler.transforms.dense import DenseBlocks
from fptq_compiler.transforms.diagonal import Diagonal
from fptq_compiler.transforms.hadamard import Hadamard
from fptq_compiler.transforms.identity import Identity
from fptq_compiler.transforms.kronecker import Kronecker
from fptq_compiler.transforms.map import Map


@dataclass(frozen=True)
class Factored:
    """M = diag(scale) (1 ⊗ F1 ⊗ F2 …).

    Attributes:
        scale: (size,) float64; None where it is one.
        factors: F1, F2, … square, float64, or the order of an identity.
    """

    scale: Tensor | None
    factors: tuple[Tensor | int, ...]

    @property
    def orders(self) -> tuple[int, ...]:
        """Of the factors."""
        return tuple(order(factor) for factor in self.factors)

    def full(self, size: int) -> tuple[Tensor | int, ...]:
        """The factors with the identity in front that makes their product `size`."""
        outer = size // prod(self.orders)
        return self.factors if outer == 1 else (outer, *self.factors)


def order(factor: Tensor | int) -> int:
    """Of a square matrix, or of the identity that it stands for."""
    return factor if isinstance(factor, int) else factor.shape[0]


@torch.no_grad()
def factored(transform: Map) -> Factored:
    """Take a map apart.

    Raises:
        TypeError: it is none that is computed at run time.
    """
    if isinstance(transform, Diagonal):
        return Factored(transform.log_scale.double().exp(), ())
    if isinstance(transform, Hadamard):
        plain = bool((transform.signs == 1).all())
        return Factored(
            None if plain else transform.signs, tuple(transform.factor_matrices())
        )
    if isinstance(transform, Identity):
        return Factored(None, (transform.size,))
    if isinstance(transform, Kronecker):
        return _product(transform)
    if isinstance(transform, DenseBlocks) and transform.blocks == 1:
        return Factored(None, (transform.matrix(),))
    message = f"{transform.describe()} has no form with small factors"
    raise TypeError(message)


def _product(transform: Kronecker) -> Factored:
    """diag(a) F ⊗ diag(b) G = diag(a ⊗ b) (F ⊗ G)."""
    sides = (transform.A, transform.B)
    forms = [factored(side) for side in sides]
    scale = None
    if any(form.scale is not None for form in forms):
        a, b = (
            torch.ones(side.size, dtype=torch.float64) if form.scale is None else form.scale
            for form, side in zip(forms, sides, strict=True)
        )
        scale = torch.kron(a, b)
    factors = [form.full(side.size) for form, side in zip(forms, sides, strict=True)]
    return Factored(scale, (*factors[0], *factors[1]))
