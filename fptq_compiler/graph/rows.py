"""Weights that are taken a few rows at a time: a vocabulary's in float64 is gigabytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

PIECE = 1 << 22
"""Values of a weight that are taken at a time."""


class Rows:
    """A weight (rows, columns) in another precision, behind maps that act on each row alone."""

    def __init__(
        self, weight: Tensor, dtype: torch.dtype, maps: tuple[Callable[[Tensor], Tensor], ...] = ()
    ) -> None:
        self._weight = weight
        self._dtype = dtype
        self._maps = maps

    def through(self, row_map: Callable[[Tensor], Tensor]) -> Rows:
        """The same behind one more map of rows (n, columns)."""
        return Rows(self._weight, self._dtype, (*self._maps, row_map))

    def pieces(self) -> Iterator[Tensor]:
        """All rows, in order."""
        step = max(1, PIECE // self._weight.shape[1])
        for rows in torch.split(self._weight, step):
            yield self._mapped(rows)

    def whole(self) -> Tensor:
        """All rows in one tensor."""
        return torch.cat(list(self.pieces()))

    def embedding(self, ids: Tensor) -> Tensor:
        """The rows of these ids: (..., columns)."""
        return self._mapped(self._weight[ids.flatten()]).reshape(*ids.shape, -1)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Give x (..., columns) times the rows: (..., rows)."""
        product = torch.cat([functional.linear(x, piece) for piece in self.pieces()], -1)
        return product if bias is None else product + bias

    def _mapped(self, rows: Tensor) -> Tensor:
        rows = rows.to(self._dtype)
        for row_map in self._maps:
            rows = row_map(rows)
        return rows
