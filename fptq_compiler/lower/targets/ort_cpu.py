"""Target `ort-cpu`: the forms of `qdq`, with ONNX Runtime's own operators where they are faster.

For one token, attention is com.microsoft.GroupQueryAttention with RoPE and cache inside. For more
it is the standard form: with a quantised cache that kernel is four times slower there, and it
takes no batch of chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from fptq_compiler.lower.emitter import Emitter
from fptq_compiler.lower.targets import Target, qdq
from fptq_compiler.lower.targets.cache import bias_of, plain_attention
from fptq_compiler.lower.targets.carried import Carried

CONTRIB = "com.microsoft"
ALIGNED = 16  # channels: the fused kernel refuses other head sizes
INT32 = ir.DataType.INT32.value


def cached_attention(op: Emitter, node: ir.Node) -> tuple[Any, ...]:
    """One token at a time by the fused kernel, more by matmuls."""
    given = Carried.of(node)
    rotated = 0 if given.cos is None else 2 * given.cos.shape[1]
    if given.head % ALIGNED or rotated % ALIGNED:
        return plain_attention(op, given)
    bias_of(op, given)  # outside of the branches: all layers share it
    single = op.once("single", lambda home: _is_single(home, given))

    def many(inner: Emitter) -> Sequence[Any]:
        return plain_attention(inner, given)

    def one(inner: Emitter) -> Sequence[Any]:
        return fused_attention(inner, given)

    found: tuple[Any, ...] = op.make(
        "If", single, outputs=3,
        then_branch=op.branch("one", one), else_branch=op.branch("many", many),
    )
    return found


def _is_single(op: Emitter, given: Carried) -> Any:
    sequence = op.Squeeze(op.Shape(given.positions, start=1, end=2))
    return op.Equal(sequence, op.int(1))


def fused_attention(op: Emitter, given: Carried) -> tuple[Any, Any, Any]:
    """`fptq.cached_attention` as one GroupQueryAttention."""
    last, length = op.once("lengths", lambda home: _lengths(home, given))
    quantized: dict[str, Any] = {}
    scales: tuple[Any, ...] = ()
    if given.bits < 16:
        quantized = {"k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR",
                     "kv_cache_bit_width": given.bits}
        scales = (None, op.Constant(value_floats=[given.key_scale]),
                  op.Constant(value_floats=[given.value_scale]))
    found: tuple[Any, Any, Any] = op.make(
        "GroupQueryAttention",
        given.q, given.k, given.v, given.past_key, given.past_value, last, length,
        given.cos, given.sin, given.positions, bias_of(op, given), *scales,
        domain=CONTRIB, outputs=3,
        num_heads=given.heads, kv_num_heads=given.kv_heads, scale=given.scale,
        do_rotary=int(given.cos is not None), rotary_interleaved=int(given.interleaved),
        **quantized,
    )
    return found


def _lengths(op: Emitter, given: Carried) -> tuple[Any, Any]:
    """(B,) the index of the last key, and the number of keys, both int32."""
    batch, total = op.Shape(given.mask, start=0, end=1), op.Shape(given.mask, start=1, end=2)
    last = op.Cast(op.Expand(op.Sub(total, op.ints(1)), batch), to=INT32)
    return last, op.Cast(op.Squeeze(total), to=INT32)


TARGET = Target(
    "ort-cpu",
    qdq.translations,
    qdq.EXPANSIONS | {"CachedAttention": cached_attention},
    session_config=qdq.TARGET.session_config,
)
