"""Which sequences a step trains on: a function of the seed and the step, so that it resumes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fptq_compiler.errors import OptimizationError


@dataclass(frozen=True)
class Batches:
    """Sequences to train on, and held-out ones that choose the best state.

    Attributes:
        rows: (N, S) token ids, each seen once in an epoch, in an order of that epoch.
        held_out: (M, S) token ids.
        size: rows a step.
        seed: of the orders.
    """

    rows: Tensor
    held_out: Tensor
    size: int
    seed: int

    @classmethod
    def split(cls, rows: Tensor, *, held_out: int, size: int, seed: int) -> Batches:
        """Hold out the last rows, far in a running text from most others: at most one in eight.

        Raises:
            OptimizationError: nothing is left to train on.
        """
        if rows.shape[0] < 2:
            message = (
                f"the training text has {rows.shape[0]} sequence of {rows.shape[1]} tokens, "
                "expected one to train on and one to hold out at least; give more text, or "
                "--steps 0"
            )
            raise OptimizationError(message)
        held_out = min(held_out, max(1, rows.shape[0] // 8))
        return cls(rows[:-held_out], rows[-held_out:], size, seed)

    def at(self, step: int) -> Tensor:
        """The batch (size, S) of a step."""
        count = self.rows.shape[0]
        places = range(step * self.size, (step + 1) * self.size)
        return self.rows[[int(self._order(p // count)[p % count]) for p in places]]

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + epoch)
        return torch.randperm(self.rows.shape[0], generator=generator)
