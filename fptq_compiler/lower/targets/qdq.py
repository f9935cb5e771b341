"""Target `qdq`: standard ONNX, opset 21, in the forms that the CPU provider runs in integers.

    linear         DequantizeLinear(Cast(INT4 codes (K, N) -> INT8), axis 1) into MatMul
    fake_quantize  QuantizeLinear and DequantizeLinear on UINT8, behind a Clip for 4-bit codes
    embedding      Gather of INT8 codes, times the gathered scale
    attention      MatMul, Softmax, MatMul, with grouped queries by reshape
    rms_norm       ReduceMean, Sqrt, Div

The widening Cast is folded when a session is made, so that INT4 stands in the file and INT8 in
memory, and the pair fuses to MatMulIntegerToFloat. Without quantised activations the weight is
dequantised from INT4 directly, which becomes MatMulNBits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
from onnxscript import opset21 as op

from fptq_compiler.graph import ops

OPSET = 21
IR_VERSION = 10
FLOAT, INT8, INT4, UINT8 = (
    ir.DataType.FLOAT.value,
    ir.DataType.INT8.value,
    ir.DataType.INT4.value,
    ir.DataType.UINT8.value,
)


def rms_norm(x: Any, gain: Any, epsilon: float) -> Any:
    """x / sqrt(mean(x^2) + epsilon), times the gain where there is one."""
    mean = op.ReduceMean(op.Mul(x, x), op.Constant(value_ints=[-1]), keepdims=1)
    shifted = op.Add(mean, op.Constant(value_float=epsilon))
    normalized = op.Div(x, op.Sqrt(shifted))
    return normalized if gain is None else op.Mul(normalized, gain)


def fake_quantize(x: Any, scale: float, zero_point: int, bits: int) -> Any:
    """Codes are carried in UINT8; 4-bit codes are clipped to 0..15 before they are rounded."""
    step = op.Constant(value_float=scale)
    zero = op.Cast(op.Constant(value_int=zero_point), to=UINT8)
    if bits < 8:
        low = op.Constant(value_float=-zero_point * scale)
        high = op.Constant(value_float=(2**bits - 1 - zero_point) * scale)
        x = op.Clip(x, low, high)
    return op.DequantizeLinear(op.QuantizeLinear(x, step, zero), step, zero)


def embedding(ids: Any, codes: Any, scale: Any, bits: int) -> Any:
    """Rows of codes and of scales, gathered; multiplied in float."""
    rows = op.Cast(op.Gather(codes, ids), to=FLOAT)
    return op.Mul(rows, op.Unsqueeze(op.Gather(scale, ids), op.Constant(value_ints=[-1])))


def attention(q: Any, k: Any, v: Any, mask: Any, causal: bool, scale: float) -> Any:
    """Grouped queries (B, H_kv, G·S, D) against keys (B, H_kv, T, D), without repeating keys."""
    heads, width = _size(q, 1), _size(q, 3)
    kv_heads = _size(k, 1)
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
    if causal:
        scores = op.Add(scores, _causal(sequence, keys))
    if mask is not None:
        scores = op.Add(scores, mask)
    weights = op.Softmax(scores, axis=-1)
    grouped = op.Concat(
        op.Constant(value_ints=[0, kv_heads]), op.Mul(group, sequence), keys, axis=0
    )
    mixed = op.MatMul(op.Reshape(weights, grouped), v)
    last = op.Concat(
        op.Constant(value_ints=[0, heads]), sequence, op.Constant(value_ints=[_size(v, 3)]), axis=0
    )
    return op.Reshape(mixed, last)


def attention_bool(q: Any, k: Any, v: Any, mask: Any, causal: bool, scale: float) -> Any:
    """Attention whose mask says what is shown."""
    hidden = op.Constant(value_float=-3.0e38)
    additive = op.Where(mask, op.Constant(value_float=0.0), hidden)
    return attention(q, k, v, additive, causal, scale)


def _causal(queries: Any, keys: Any) -> Any:
    """(S, T) additive: 0 up to the diagonal that ends at the last key, -inf behind it."""
    hidden = op.Expand(op.Constant(value_float=-3.0e38), op.Concat(queries, keys, axis=0))
    diagonal = op.Squeeze(op.Sub(op.Add(keys, op.Constant(value_ints=[1])), queries))
    return op.Trilu(hidden, diagonal, upper=1)


def _size(value: Any, axis: int) -> int:
    size = value.shape[axis]
    assert isinstance(size, int), value
    return size


def linear(x: Any, codes: Any, scale: Any, bias: Any, bits: int, block: int) -> Any:
    """Codes (K, N) in INT8, narrowed to INT4 for the file where they fit (see lower.packing)."""
    narrow = op.Cast(codes, to=INT4) if bits == 4 else codes
    wide = op.Cast(narrow, to=INT8) if bits == 4 else codes
    if block:
        weight = op.DequantizeLinear(narrow, scale, axis=0, block_size=block)
    else:
        weight = op.DequantizeLinear(wide, scale, axis=1)
    product = op.MatMul(x, weight)
    return product if bias is None else op.Add(product, bias)


def translations(*, integer_activations: bool) -> dict[Any, Callable[..., Any]]:
    """The emitters by operator, for torch.onnx.export's custom_translation_table."""
    return {
        ops.rms_norm: rms_norm,
        ops.fake_quantize: fake_quantize,
        ops.embedding: embedding,
        ops.attention: attention,
        ops.linear: linear if integer_activations else weight_only_linear,
    }


def weight_only_linear(x: Any, codes: Any, scale: Any, bias: Any, bits: int, block: int) -> Any:
    """Weights dequantised straight from INT4: the form that becomes MatMulNBits."""
    narrow = op.Cast(codes, to=INT4) if bits == 4 else codes
    if block:
        weight = op.DequantizeLinear(narrow, scale, axis=0, block_size=block)
    else:
        weight = op.DequantizeLinear(narrow, scale, axis=1)
    product = op.MatMul(x, weight)
    return product if bias is None else op.Add(product, bias)
