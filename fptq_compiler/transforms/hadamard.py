"""Fixed orthogonal mixing of all channels, in factored form: T_d of arXiv 2506.04985."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from fptq_compiler.transforms.hadamard_factors import plan
from fptq_compiler.transforms.map import Map


class Hadamard(Map):
    """M = diag(signs) (1 ⊗ F1 ⊗ F2 ...) per block, orthogonal, never formed densely.

    The factors are Hadamard matrices where their orders allow and Hartley matrices for what
    remains, see `hadamard_factors.plan`; every width works. Nothing is trainable.

    Attributes:
        signs: (size,) float64 of ±1, applied before the factors.
        orders: the orders of the factors; their product divides `block`, and equals it unless
            `block` has a prime factor above 512.
    """

    commutes_with = "RMSNorm without gain, token mixing"
    exact_buffers: tuple[str, ...] = ("signs",)
    signs: Tensor

    def __init__(self, size: int, signs: Tensor | None = None, blocks: int = 1) -> None:
        """Choose the factors of size / blocks.

        Args:
            size: channels in all.
            signs: (size,) of ±1; all plus if not given.
            blocks: equal diagonal blocks, each mixed in itself.

        Raises:
            ValueError: signs have another shape or other values.
        """
        super().__init__(size, blocks)
        if signs is None:
            signs = torch.ones(size)
        if signs.shape != (size,) or not bool((signs.abs() == 1).all()):
            message = f"signs must be {size} numbers ±1, got shape {tuple(signs.shape)}"
            raise ValueError(message)
        self.register_buffer("signs", signs.detach().to(torch.float64).clone())
        self.plan = plan(self.block)
        self.orders = tuple(factor.order for factor in self.plan)
        names = []
        for index, factor in enumerate(self.plan):
            names.append(f"factor{index}")
            self.register_buffer(names[-1], factor.matrix(), persistent=False)
        self.exact_buffers = ("signs", *names)

    def factor_matrices(self) -> list[Tensor]:
        """F1, F2, ... as float64, so that the map can be written as reshapes and matmuls.

        With the last axis reshaped to (blocks * identity, order 1, order 2, ...), each factor
        multiplies its own axis from the right: y_k = Σ_i x_i F_ik.
        """
        return [self.get_buffer(f"factor{index}") for index in range(len(self.plan))]

    def describe(self) -> str:
        """For example "48 x 32 Hadamard", or with what is not Hadamard named."""
        by_kind = {
            kind: " x ".join(str(item.order) for item in self.plan if item.hadamard is kind)
            for kind in (True, False)
        }
        names = [f"{by_kind[True]} Hadamard" if by_kind[True] else ""]
        names.append(f"{by_kind[False]} Hartley" if by_kind[False] else "")
        words = " x ".join(name for name in names if name) or "signs only"
        outer = self.size // prod(self.orders)
        return words if outer == 1 else f"block diagonal, {outer} blocks of {words}"

    def _multiply(self, x: Tensor) -> Tensor:
        return self._mix(x * self._signs(x), transpose=False)

    def _multiply_inverse(self, x: Tensor) -> Tensor:
        return self._mix(x, transpose=True) * self._signs(x)

    _multiply_inverse_transpose = _multiply

    def _signs(self, x: Tensor) -> Tensor:
        return self.signs.to(x.dtype).view(self.blocks, 1, self.block)

    def _mix(self, x: Tensor, transpose: bool) -> Tensor:
        shape = x.shape
        after = prod(self.orders)
        for factor in self.factor_matrices():
            order = factor.shape[0]
            after //= order
            matrix = factor.to(x.dtype)
            matrix = matrix.mT if transpose else matrix
            if after == 1:
                x = x.reshape(-1, order) @ matrix
            else:
                x = matrix.mT @ x.reshape(-1, order, after)
        return x.reshape(shape)

    @torch.no_grad()
    def randomize_(self, generator: torch.Generator, strength: float) -> None:
        """Flip each sign with probability min(strength, 1) / 2."""
        drawn = torch.rand(self.size, generator=generator, device=generator.device)
        flips = (drawn < min(strength, 1.0) / 2).to(self.signs.device)
        self.signs.copy_(torch.where(flips, -self.signs, self.signs))


def random_signs(size: int, generator: torch.Generator) -> Tensor:
    """(size,) float64 of ±1, each with probability one half."""
    drawn = torch.randint(0, 2, (size,), generator=generator, device=generator.device)
    return drawn.to(torch.float64) * 2 - 1
