"""The form of `quant.pairs` in standard operators: INT4 codes, two to a byte, read back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fptq_compiler.lower.targets.types import FLOAT, UINT8


def unpack_pairs(op: Any, packed: Any, shape: Sequence[int]) -> Any:
    """UINT8 (..., D / 2) as the codes (..., D) in float.

    Args:
        op: makes the nodes: an Emitter, or an opset of onnxscript.
        packed: the bytes.
        shape: of the codes, with 0 and -1 as Reshape takes them.
    """
    low = op.BitwiseAnd(packed, byte(op, 15))
    high = op.BitShift(packed, byte(op, 4), direction="RIGHT")
    last = op.Constant(value_ints=[-1])
    pairs = op.Concat(op.Unsqueeze(low, last), op.Unsqueeze(high, last), axis=-1)
    codes = op.Cast(op.Reshape(pairs, op.Constant(value_ints=list(shape))), to=FLOAT)
    return op.Sub(codes, op.Constant(value_float=8.0))


def byte(op: Any, value: int) -> Any:
    """A constant UINT8 scalar."""
    return op.Cast(op.Constant(value_int=value), to=UINT8)
