"""Target `qdq`: standard ONNX, opset 21, in the forms that the CPU provider runs in integers.

    linear         DequantizeLinear(Cast(INT4 codes (K, N) -> INT8), axis 1) into MatMul
    fake_quantize  QuantizeLinear and DequantizeLinear on UINT8, behind a Clip for 4-bit codes
    embedding      Gather of codes, INT4 ones two to a byte, times the gathered scale
    attention      MatMul, Softmax, MatMul, with grouped queries by reshape
    rms_norm       ReduceMean, Sqrt, Div

The widening Cast is folded when a session is made, so that INT4 stands in the file and INT8 in
memory, and the pair fuses to MatMulIntegerToFloat. 8-bit weights become UINT8 there, whose kernel
is exact on every processor. Where the activation is float, or the weight
has a scale a block (which no integer kernel takes), the weight is dequantised from INT4
directly, which becomes MatMulNBits; the activation's codes are then turned back by Cast, Sub and
Mul, because a DequantizeLinear in front of that matmul would stop the fusion.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset21 as op

from fptq_compiler.graph import cache_ops, ops
from fptq_compiler.graph.program import Program
from fptq_compiler.lower.contract import broken_promises
from fptq_compiler.lower.emitter import Emitter
from fptq_compiler.lower.expand import Expansion
from fptq_compiler.lower.targets import Target, cache
from fptq_compiler.lower.targets.carried import Carried, carry_attention, carry_positions
from fptq_compiler.lower.targets.forms import Forms, forms_of
from fptq_compiler.lower.targets.pairs import unpack_pairs
from fptq_compiler.lower.targets.types import FLOAT, INT4, INT8, INT16, UINT8


def rms_norm(x: Any, gain: Any, epsilon: float) -> Any:
    """Give x / sqrt(mean(x^2) + epsilon), times the gain where there is one."""
    mean = op.ReduceMean(op.Mul(x, x), op.Constant(value_ints=[-1]), keepdims=1)
    shifted = op.Add(mean, op.Constant(value_float=epsilon))
    normalized = op.Div(x, op.Sqrt(shifted))
    return normalized if gain is None else op.Mul(normalized, gain)


def sum_of_squares(x: Any) -> Any:
    """Give the sum of the squares along the last axis, which is kept."""
    return op.ReduceSumSquare(x, op.Constant(value_ints=[-1]), keepdims=1)


def fake_quantize(
    x: Any, scale: float, zero_point: int, bits: int, role: str, *, forms: Forms
) -> Any:
    """Codes are carried in UINT8; 4-bit codes are clipped to 0..15 before they are rounded."""
    step = op.Constant(value_float=scale)
    zero = op.Cast(op.Constant(value_int=zero_point), to=UINT8)
    if bits < 8:
        low = op.Constant(value_float=-zero_point * scale)
        high = op.Constant(value_float=(2**bits - 1 - zero_point) * scale)
        x = op.Clip(x, low, high)
    elif role in ("key", "value") and not forms.integer_linears:
        # A Q behind a weight-only linear, even beyond a Transpose, would stop its fusion.
        x = op.Max(x, op.Constant(value_float=cache.LOWEST))
    codes = op.QuantizeLinear(x, step, zero)
    if role == "linear input" and not forms.integer_linears:
        shifted = op.Sub(op.Cast(codes, to=FLOAT), op.Constant(value_float=float(zero_point)))
        return op.Mul(shifted, step)
    return op.DequantizeLinear(codes, step, zero)


def relu(x: Any) -> Any:
    """As Max: a Relu stops the fusion of a matmul before it, and is lost before 4-bit codes."""
    return op.Max(x, op.Constant(value_float=0.0))


def embedding(ids: Any, codes: Any, scale: Any, bits: int) -> Any:
    """Rows of codes and of scales, gathered; multiplied in float."""
    rows = op.Gather(codes, ids)
    if bits == 4:
        rows = unpack_pairs(op, rows, [*[0] * len(ids.shape), 2 * size(codes, 1)])
    else:
        rows = op.Cast(rows, to=FLOAT)
    return op.Mul(rows, op.Unsqueeze(op.Gather(scale, ids), op.Constant(value_ints=[-1])))


def attention(
    q: Any, k: Any, v: Any, mask: Any, causal: bool, scale: float, softcap: float = 0.0,
    window: int = 0,
) -> Any:
    """Grouped queries (B, H_kv, G·S, D) against keys (B, H_kv, T, D), without repeating keys."""
    heads, width = size(q, 1), size(q, 3)
    kv_heads = size(k, 1)
    sequence = op.Shape(q, start=2, end=3)
    group = op.Constant(value_ints=[heads // kv_heads])
    # (B, H, S, D) -> (B, H_kv, G·S, D)
    folded = op.Concat(
        op.Constant(value_ints=[0, kv_heads]),
        op.Mul(group, sequence),
        op.Constant(value_ints=[width]),
        axis=0,
    )
    scaled = op.Mul(q, op.Constant(value_float=scale))
    scores = op.MatMul(op.Reshape(scaled, folded), op.Transpose(k, perm=[0, 1, 3, 2]))
    # (B, H_kv, G·S, T) -> (B, H, S, T)
    keys = op.Shape(k, start=2, end=3)
    unfolded = op.Concat(op.Constant(value_ints=[0, heads]), sequence, keys, axis=0)
    scores = op.Reshape(scores, unfolded)
    if softcap:
        cap = op.Constant(value_float=softcap)
        scores = op.Mul(op.Tanh(op.Div(scores, cap)), cap)
    if causal:
        scores = op.Add(scores, _causal(sequence, keys))
    if window:
        scores = op.Add(scores, _far(sequence, keys, window))
    if mask is not None:
        scores = op.Add(scores, _additive(mask))
    weights = op.Softmax(scores, axis=-1)
    grouped = op.Concat(
        op.Constant(value_ints=[0, kv_heads]), op.Mul(group, sequence), keys, axis=0
    )
    mixed = op.MatMul(op.Reshape(weights, grouped), v)
    last = op.Concat(
        op.Constant(value_ints=[0, heads]), sequence, op.Constant(value_ints=[size(v, 3)]), axis=0
    )
    return op.Reshape(mixed, last)


def _additive(mask: Any) -> Any:
    """A boolean mask (true: shown) as numbers to add; numbers stay."""
    if mask.dtype != ir.DataType.BOOL:
        return mask
    shown, hidden = op.Constant(value_float=0.0), op.Constant(value_float=cache.LOWEST)
    return op.Where(mask, shown, hidden)


def _causal(queries: Any, keys: Any) -> Any:
    """(S, T) additive: 0 up to the diagonal that ends at the last key, lowest behind it."""
    hidden = op.Expand(op.Constant(value_float=cache.LOWEST), op.Concat(queries, keys, axis=0))
    diagonal = op.Squeeze(op.Sub(op.Add(keys, op.Constant(value_ints=[1])), queries))
    return op.Trilu(hidden, diagonal, upper=1)


def _far(queries: Any, keys: Any, window: int) -> Any:
    """(S, T) additive: lowest for keys that lie a window or more behind the query, else 0."""
    hidden = op.Expand(op.Constant(value_float=cache.LOWEST), op.Concat(queries, keys, axis=0))
    behind = op.Sub(op.Sub(keys, op.Constant(value_ints=[window])), queries)
    return op.Trilu(hidden, op.Squeeze(behind), upper=0)


def size(value: Any, axis: int) -> int:
    """A dimension that is a number, not a symbol."""
    found = value.shape[axis]
    assert isinstance(found, int), value
    return found


def linear(
    x: Any, codes: Any, scale: Any, bias: Any, bits: int, block: int, *, forms: Forms
) -> Any:
    """Codes (K, N) in INT8, narrowed to INT4 where they fit (a Cast that lower.packing folds)."""
    narrow = op.Cast(codes, to=INT4) if bits == 4 else codes
    if block:
        weight = op.DequantizeLinear(narrow, scale, axis=0, block_size=block)
    elif bits == 8 and forms.quantized_activations:
        zeros = op.Expand(offset(UINT8), op.Shape(scale))
        weight = op.DequantizeLinear(unsigned(codes), scale, zeros, axis=1)
    elif forms.integer_linears:
        weight = op.DequantizeLinear(op.Cast(narrow, to=INT8), scale, axis=1)
    elif bits == 4:
        weight = op.DequantizeLinear(narrow, scale, axis=1)
    else:
        # INT8 MatMulNBits is slower than float by a factor of ten: widen when the model loads.
        weight = op.Mul(op.Cast(codes, to=FLOAT), scale)
    product = op.MatMul(x, weight)
    if bias is None:
        return product
    # MatMul and Add on two axes would become Gemm, which has no kernel for INT4 or INT8 weights.
    return op.Sum(product, bias) if len(x.shape) == 2 else op.Add(product, bias)


OFFSET = 128
"""From INT8 to UINT8."""


def unsigned(codes: Any) -> Any:
    """INT8 codes in UINT8, OFFSET higher; folded when a session is made.

    On x64 without VNNI ONNX Runtime's kernel for UINT8 activations and INT8 weights sums pairs of
    products in 16 bits, which saturate for weights beyond 7 bits; that for UINT8 weights does not.
    """
    return op.Cast(op.Add(op.Cast(codes, to=INT16), offset(INT16)), to=UINT8)


def offset(kind: int) -> Any:
    """A constant scalar OFFSET of that type."""
    return op.Cast(op.Constant(value_int=OFFSET), to=kind)


def translations(program: Program) -> dict[Any, Callable[..., Any]]:
    """The emitters by operator, for torch.onnx.export's custom_translation_table."""
    forms = forms_of(program)

    def emit_fake_quantize(
        x: Any, scale: float, zero_point: int, bits: int, role: str
    ) -> Any:
        return fake_quantize(x, scale, zero_point, bits, role, forms=forms)

    def emit_linear(x: Any, codes: Any, scale: Any, bias: Any, bits: int, block: int) -> Any:
        return linear(x, codes, scale, bias, bits, block, forms=forms)

    return {
        cache_ops.positions: carry_positions,
        cache_ops.cached_attention: carry_attention,
        torch.ops.aten.relu.default: relu,
        ops.sum_of_squares: sum_of_squares,
        ops.rms_norm: rms_norm,
        ops.fake_quantize: emit_fake_quantize,
        ops.embedding: embedding,
        ops.attention: attention,
        ops.linear: emit_linear,
    }


def _cached_attention(op: Emitter, node: ir.Node) -> tuple[Any, ...]:
    return cache.plain_attention(op, Carried.of(node))


def _positions(op: Emitter, node: ir.Node) -> tuple[Any, ...]:
    return (cache.positions(op, *node.inputs),)


EXPANSIONS: dict[str, Expansion] = {
    "CachedAttention": _cached_attention, "Positions": _positions,
}
TARGET = Target(
    "qdq", translations, EXPANSIONS, broken_promises,
    session_config={"session.qdq_matmulnbits_accuracy_level": "1"}
)
