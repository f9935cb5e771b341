"""The Kronecker product of two maps."""

from __future__ import annotations

from torch import Tensor

from fptq_compiler.transforms.map import Map


class Kronecker(Map):
    """M = A ⊗ B: channel i * B.size + j goes by A in i and by B in j; never formed densely."""

    def __init__(self, A: Map, B: Map) -> None:
        super().__init__(A.size * B.size)
        self.A = A
        self.B = B

    def _grid(self, x: Tensor) -> Tensor:
        return x.reshape(-1, self.A.size, self.B.size)

    def _multiply(self, x: Tensor) -> Tensor:
        return self.A.right(self.B.right(self._grid(x)).mT).mT.reshape(x.shape)

    def _multiply_inverse(self, x: Tensor) -> Tensor:
        return self.A.right_inverse(self.B.right_inverse(self._grid(x)).mT).mT.reshape(x.shape)

    def _multiply_inverse_transpose(self, x: Tensor) -> Tensor:
        by_B = self.B.right_inverse_transpose(self._grid(x))
        return self.A.right_inverse_transpose(by_B.mT).mT.reshape(x.shape)

    def describe(self) -> str:
        """Both factors."""
        return f"({self.A.describe()}) ⊗ ({self.B.describe()})"
