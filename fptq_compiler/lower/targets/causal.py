"""Attention of a prompt in pieces: a piece of queries reads the keys up to its own end.

A kernel that takes a mask multiplies every query with every key and then hides half of them.
Four pieces leave 5/8 of that work, and 1/4 of the scores in memory at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

from fptq_compiler.lower.emitter import Emitter
from fptq_compiler.lower.targets.cache import bias_of
from fptq_compiler.lower.targets.carried import Carried

PIECES: Final = 4
SHORTEST: Final = 8  # queries: fewer are not worth the pieces


@dataclass(frozen=True)
class _Piece:
    """Queries `low` to `high`, the end of the keys that they see, and what hides the rest."""

    low: Any
    high: Any
    keys: Any
    bias: Any


def attention_in_pieces(op: Emitter, given: Carried, q: Any, k: Any, v: Any) -> Any:
    """(B, H, S, D) from q (B, H, S, D) and all keys and values (B, H_kv, T, D), in float."""
    pieces = op.once(("pieces", given.window), lambda home: _pieces(home, given))
    long = op.once("long", lambda home: _is_long(home, given))

    def whole(inner: Emitter) -> Sequence[Any]:
        return [_attention(inner, given, q, k, v, bias_of(inner, given))]

    def apart(inner: Emitter) -> Sequence[Any]:
        axis, start = inner.ints(2), inner.ints(0)
        found = []
        for piece in pieces:
            queries = inner.Slice(q, piece.low, piece.high, axis)
            keys, values = (inner.Slice(x, start, piece.keys, axis) for x in (k, v))
            found.append(_attention(inner, given, queries, keys, values, piece.bias))
        return [inner.Concat(*found, axis=2)]

    return op.make(
        "If", long, then_branch=op.branch("pieces", apart), else_branch=op.branch("whole", whole)
    )


def _attention(op: Emitter, given: Carried, q: Any, k: Any, v: Any, bias: Any) -> Any:
    return op.Attention(q, k, v, bias, scale=given.scale, softcap=given.softcap)


def _is_long(op: Emitter, given: Carried) -> Any:
    sequence = op.Squeeze(op.Shape(given.positions, start=1, end=2))
    return op.Less(op.int(SHORTEST - 1), sequence)


def _pieces(op: Emitter, given: Carried) -> list[_Piece]:
    """As equal as whole numbers allow; the last ends with the last query and the last key."""
    sequence = op.Shape(given.positions, start=1, end=2)
    past = op.Sub(op.Shape(given.mask, start=1, end=2), sequence)
    ends = [
        op.Div(op.Mul(sequence, op.ints(number)), op.ints(PIECES)) for number in range(PIECES + 1)
    ]
    bias, axes = bias_of(op, given), op.ints(2, 3)
    found = []
    for low, high in pairwise(ends):
        keys = op.Add(past, high)
        start = op.Concat(low, op.ints(0), axis=0)
        seen = op.Slice(bias, start, op.Concat(high, keys, axis=0), axes)
        found.append(_Piece(low, high, keys, seen))
    return found
