"""The forms of a KV cache in standard operators, opset 21.

Codes are made by Div, Round, Clip and Cast and read by Cast and Mul, not by QuantizeLinear and
DequantizeLinear: ONNX Runtime moves those through the Concat of a cache and, for INT8 on x64,
then refuses its own graph.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from fptq_compiler.lower.emitter import Emitter
from fptq_compiler.lower.targets.carried import Carried
from fptq_compiler.lower.targets.pairs import byte, unpack_pairs
from fptq_compiler.lower.targets.types import BOOL, FLOAT, FLOAT16, INT8, UINT8

LOWEST = -3.0e38  # added to a score it hides the key; -inf would make rows of NaN
LOWEST_OF_FLOAT16 = -3.0e4


def positions(op: Emitter, mask: Any, ids: Any) -> Any:
    """(B, S): how many tokens stand before each of the last S."""
    counted = op.CumSum(mask, op.int(1))
    before = op.Max(op.Sub(counted, op.int(1)), op.int(0))
    sequence = op.Shape(ids, start=1, end=2)
    return op.Slice(before, op.Neg(sequence), op.ints(_END), op.ints(1))


_END = 2**62


def hidden_keys(op: Emitter, mask: Any, positions: Any, window: int = 0) -> Any:
    """(B, 1, S, T) to add to scores: 0 where a query sees a key, else lowest.

    A query sees the tokens up to its own place, no more than the window holds, and always itself.
    """
    total = op.Shape(mask, start=1, end=2)
    sequence = op.Shape(positions, start=1, end=2)
    keys = op.Range(op.int(0), op.Squeeze(total), op.int(1))
    queries = op.Unsqueeze(op.Slice(keys, op.Neg(sequence), op.ints(_END)), op.ints(1))
    shown = op.And(op.Less(keys, queries), op.Unsqueeze(op.Cast(mask, to=BOOL), op.ints(1, 2)))
    if window:
        counted = op.Unsqueeze(op.Sub(op.CumSum(mask, op.int(1)), op.int(1)), op.ints(1))
        behind = op.Sub(op.Unsqueeze(positions, op.ints(2)), counted)
        near = op.Unsqueeze(op.Less(behind, op.int(window)), op.ints(1))
        shown = op.And(shown, near)
    seen = op.Or(shown, op.Equal(keys, queries))
    lowest = LOWEST_OF_FLOAT16 if op.float_type == FLOAT16 else LOWEST
    return op.Where(seen, op.float(0.0), op.float(lowest))


def rotate(
    op: Emitter, x: Any, cos: Any, sin: Any, width: int, head: int, interleaved: bool
) -> Any:
    """Rotate the first `width` channels of (B, S, H, D) by the angles of (B, S, 1, width / 2)."""
    turned = x if width == head else op.Slice(x, op.ints(0), op.ints(width), op.ints(3))
    if interleaved:
        a = op.Slice(turned, op.ints(0), op.ints(width), op.ints(3), op.ints(2))
        b = op.Slice(turned, op.ints(1), op.ints(width), op.ints(3), op.ints(2))
    else:
        a = op.Slice(turned, op.ints(0), op.ints(width // 2), op.ints(3))
        b = op.Slice(turned, op.ints(width // 2), op.ints(width), op.ints(3))
    first = op.Sub(op.Mul(a, cos), op.Mul(b, sin))
    second = op.Add(op.Mul(b, cos), op.Mul(a, sin))
    if interleaved:
        pair = op.Concat(
            op.Unsqueeze(first, op.ints(4)), op.Unsqueeze(second, op.ints(4)), axis=4
        )
        parts = [op.Reshape(pair, op.ints(0, 0, 0, width))]
    else:
        parts = [first, second]
    if width < head:
        parts.append(op.Slice(x, op.ints(width), op.ints(head), op.ints(3)))
    return op.Concat(*parts, axis=3)


def encode(op: Emitter, x: Any, scale: Any, bits: int) -> Any:
    """Codes of (..., D) as the cache holds them; the scale broadcasts to x, None is float.

    In float32, as the fused kernels compute them.
    """
    if scale is None:
        return x
    low, high = -float(1 << (bits - 1)), float((1 << (bits - 1)) - 1)
    rounded = op.Round(op.Div(op.wide(x), scale))
    codes = op.Clip(rounded, op.float32(low), op.float32(high))
    if bits == 8:
        return op.Cast(codes, to=INT8)
    shifted = op.Cast(op.Sub(codes, op.float32(low)), to=UINT8)
    even = op.Slice(shifted, op.ints(0), op.ints(_END), op.ints(-1), op.ints(2))
    odd = op.Slice(shifted, op.ints(1), op.ints(_END), op.ints(-1), op.ints(2))
    return op.BitwiseOr(even, op.BitShift(odd, byte(op, 4), direction="LEFT"))


def decode(op: Emitter, cache: Any, scale: Any, bits: int, head: int) -> Any:
    """The values of codes (B, H_kv, T, D), or of (B, T, H_kv, D) with a scale for that."""
    if scale is None:
        return cache
    codes = op.Cast(cache, to=FLOAT) if bits == 8 else unpack_pairs(op, cache, (0, 0, -1, head))
    return op.narrow(op.Mul(codes, scale))


def grouped_attention(op: Emitter, given: Carried, q: Any, k: Any, v: Any) -> Any:
    """(B, S, H·D) from q (B, S, H, D) and keys and values (B, H_kv, T, D).

    Query heads that share keys are rows of one matmul.
    """
    heads, kv_heads, head, bias = given.heads, given.kv_heads, given.head, bias_of(op, given)
    group = heads // kv_heads
    scaled = op.Mul(q, op.float(given.scale))
    # (B, S, H, D) -> (B, H_kv, G, S, D) -> (B, H_kv, G·S, D)
    split = op.Reshape(scaled, op.ints(0, 0, kv_heads, group, head))
    rows = op.Reshape(op.Transpose(split, perm=[0, 2, 3, 1, 4]), op.ints(0, kv_heads, -1, head))
    scores = op.MatMul(rows, op.Transpose(k, perm=[0, 1, 3, 2]))
    sequence, keys = op.Shape(q, start=1, end=2), op.Shape(k, start=2, end=3)
    apart = op.Concat(op.ints(0, kv_heads, group), sequence, keys, axis=0)
    scores = op.Reshape(scores, apart)
    if given.softcap:
        cap = op.float(given.softcap)
        scores = op.Mul(op.Tanh(op.Div(scores, cap)), cap)
    shown = op.Add(scores, op.Unsqueeze(bias, op.ints(1)))
    weights = op.narrow(op.Softmax(op.wide(shown), axis=-1))
    together = op.Concat(op.ints(0, kv_heads, -1), keys, axis=0)
    mixed = op.MatMul(op.Reshape(weights, together), v)
    whole = op.Concat(op.ints(0, kv_heads, group), sequence, op.ints(head), axis=0)
    ordered = op.Transpose(op.Reshape(mixed, whole), perm=[0, 3, 1, 2, 4])
    return op.Reshape(ordered, op.ints(0, 0, heads * head))


def split_heads(op: Emitter, x: Any, heads: int, head: int) -> Any:
    """(B, S, H·D) as (B, S, H, D)."""
    return op.Reshape(x, op.ints(0, 0, heads, head))


def projections(op: Emitter, given: Carried) -> tuple[Any, Any, Any]:
    """Q (B, S, H, D), k and v (B, S, H_kv, D), taken apart where q holds all three."""
    counts = (given.heads, given.kv_heads, given.kv_heads)
    if given.k is None:
        together = split_heads(op, given.q, sum(counts), given.head)
        found: tuple[Any, Any, Any] = op.make(
            "Split", together, op.ints(*counts), outputs=3, axis=2
        )
        return found
    values = zip((given.q, given.k, given.v), counts, strict=True)
    q, k, v = (split_heads(op, value, count, given.head) for value, count in values)
    return q, k, v


def plain_attention(op: Emitter, given: Carried) -> tuple[Any, Any, Any]:
    """`fptq.cached_attention` in standard operators: output, present key and value."""
    head, bits = given.head, given.bits
    q, k, v = projections(op, given)
    if given.cos is not None:
        cos, sin = (
            op.once(("angles", t.name), partial(angles, table=t, positions=given.positions))
            for t in (given.cos, given.sin)
        )
        rotated = 2 * given.cos.shape[1]
        q = rotate(op, q, cos, sin, rotated, head, given.interleaved)
        k = rotate(op, k, cos, sin, rotated, head, given.interleaved)
    stored = [
        encode(op, op.Transpose(x, perm=[0, 2, 1, 3]), scale, bits)
        for x, scale in ((k, given.key_scale), (v, given.value_scale))
    ]
    present_key = op.Concat(given.past_key, stored[0], axis=2)
    present_value = op.Concat(given.past_value, stored[1], axis=2)
    mixed = grouped_attention(
        op, given, q,
        decode(op, present_key, given.key_scale, bits, head),
        decode(op, present_value, given.value_scale, bits, head),
    )
    return mixed, present_key, present_value


def angles(op: Emitter, table: Any, positions: Any) -> Any:
    """(B, S, 1, R / 2): a table's rows for the positions of this run."""
    return op.Unsqueeze(op.Gather(table, positions), op.ints(2))


def bias_of(op: Emitter, given: Carried) -> Any:
    """What hides keys, one tensor for all layers with one window."""
    made = partial(
        hidden_keys, mask=given.mask, positions=given.positions, window=given.window
    )
    return op.once(("hidden keys", given.window), made)
