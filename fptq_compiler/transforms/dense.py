"""Maps that are evaluated as dense blocks, and how many uses can share one evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fptq_compiler.transforms.map import Map


class DenseBlocks(Map):
    """A map that first builds its blocks M and M⁻ᵀ, each (blocks, block, block)."""

    def __init__(self, size: int, blocks: int = 1) -> None:
        super().__init__(size, blocks)
        self._shared: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    def _build(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def dense(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(M, M⁻ᵀ) in this dtype, each (blocks, block, block); differentiable."""
        shared = self._shared.get(dtype)
        return self._build(dtype) if shared is None else shared

    def _multiply(self, x: Tensor) -> Tensor:
        return _matmul_blocks(x, self.dense(x.dtype)[0])

    def _multiply_inverse(self, x: Tensor) -> Tensor:
        return _matmul_blocks(x, self.dense(x.dtype)[1].mT)

    def _multiply_inverse_transpose(self, x: Tensor) -> Tensor:
        return _matmul_blocks(x, self.dense(x.dtype)[1])


@contextmanager
def shared_evaluation(module: nn.Module, dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Evaluate every dense map inside `module` once, and share the result among all its uses.

    Wrap one training step (forward *and* backward): one map of the residual stream is read by
    every weight of the model, and its Cayley solve is needed only once. All are evaluated on
    entry, so activation checkpointing records the same operations when it recomputes. Leave the
    context before the parameters are changed; nesting for the same module is not needed.

    Args:
        module: the root whose `DenseBlocks` are evaluated.
        dtype: of the evaluation: float32 to train, float64 to fold.
    """
    maps = [child for child in module.modules() if isinstance(child, DenseBlocks)]
    try:
        for child in reversed(maps):  # inner ones first: an Affine is built from Rotations
            child._shared[dtype] = child.dense(dtype)
        yield
    finally:
        for child in maps:
            child._shared.pop(dtype, None)


def _matmul_blocks(x: Tensor, matrices: Tensor) -> Tensor:
    """(rows, blocks, repeat, block) times (blocks, block, block) on the last axis."""
    rows, blocks, repeat, block = x.shape
    if blocks == 1:
        return (x.reshape(rows * repeat, block) @ matrices[0]).view(rows, 1, repeat, block)
    stacked = x.permute(1, 0, 2, 3).reshape(blocks, rows * repeat, block)
    return torch.bmm(stacked, matrices).view(blocks, rows, repeat, block).permute(1, 0, 2, 3)
