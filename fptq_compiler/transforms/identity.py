"""The map that does nothing: a site left as it is."""

from __future__ import annotations

from torch import Tensor

from fptq_compiler.transforms.map import Map


class Identity(Map):
    """M = 1. Has no parameters; commutes with everything."""

    commutes_with = "everything"

    def _multiply(self, x: Tensor) -> Tensor:
        return x

    _multiply_inverse = _multiply
    _multiply_inverse_transpose = _multiply
