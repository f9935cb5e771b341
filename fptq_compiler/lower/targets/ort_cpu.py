"""Target `ort-cpu`: the forms of `qdq`, with ONNX Runtime's own operators where they are faster.

A linear is com.microsoft.MatMulIntegerToFloat, which adds the bias that the fusion of QDQ leaves
outside. An INT4 table is read by com.microsoft.GatherBlockQuantized, a block a row. A norm is
SimplifiedLayerNormalization, which stands in the standard domain but not in the standard. A
cached attention is, for one token, com.microsoft.GroupQueryAttention with RoPE and cache inside;
for more it is Attention-23 on the decoded cache, for with a quantised cache the other kernel is
four times slower there, and it takes no batch of chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
from onnxscript import opset21 as opset
from onnxscript.values import Opset

from fptq_compiler.graph import ops
from fptq_compiler.graph.program import Program
from fptq_compiler.lower.emitter import Emitter
from fptq_compiler.lower.targets import Target, qdq, schemas
from fptq_compiler.lower.targets.cache import (
    bias_of,
    decode,
    encode,
    plain_attention,
    split_heads,
)
from fptq_compiler.lower.targets.carried import Carried, carry_rms_norm, carry_unit_rms
from fptq_compiler.lower.targets.causal import attention_in_pieces
from fptq_compiler.lower.targets.forms import Forms, forms_of
from fptq_compiler.lower.targets.schemas import INT, register
from fptq_compiler.lower.targets.types import INT4, INT8, INT32, UINT8

CONTRIB = "com.microsoft"
ALIGNED = 16  # channels: the fused kernel refuses other head sizes
register(
    CONTRIB, "MatMulIntegerToFloat",
    ("A", "B", "a_scale", "b_scale", "a_zero_point?", "b_zero_point?", "bias?"), ("Y",), {},
)
register(
    CONTRIB, "GatherBlockQuantized", ("data", "indices", "scales"), ("output",),
    {"bits": INT, "block_size": INT, "gather_axis": INT, "quantize_axis": INT},
)
register(  # ONNX Runtime's own, though in the standard domain
    "", "SimplifiedLayerNormalization", ("X", "scale"), ("Y", "inv_std_var?"),
    {"axis": INT, "epsilon": schemas.FLOAT, "stash_type": INT},
)
contrib = Opset(CONTRIB, 1)
SMALLEST_BLOCK = 16  # of GatherBlockQuantized, whose blocks are powers of two


def cached_attention(op: Emitter, node: ir.Node) -> tuple[Any, ...]:
    """One token at a time by the fused kernel, more by matmuls."""
    given = Carried.of(node)
    places = (given.positions, bias_of(op, given))
    return fused_where(op, given, _is_single, *places)


def fused_where(
    op: Emitter, given: Carried, condition: Callable[[Emitter, Carried], Any],
    positions: Any, bias: Any,
) -> tuple[Any, ...]:
    """The fused kernel in the runs in which `condition` holds, Attention-23 in the others."""
    rotated = 0 if given.cos is None else 2 * given.cos.shape[1]
    if given.head % ALIGNED or rotated % ALIGNED:
        return plain_attention(op, given)
    bias_of(op, given)  # outside of the branches: all layers share it
    fused = op.once("fused", lambda home: condition(home, given))

    def many(inner: Emitter) -> Sequence[Any]:
        return attention_of_many(inner, given)

    def one(inner: Emitter) -> Sequence[Any]:
        return fused_attention(inner, given, positions, bias)

    found: tuple[Any, ...] = op.make(
        "If", fused, outputs=3,
        then_branch=op.branch("one", one), else_branch=op.branch("many", many),
    )
    return found


def attention_of_many(op: Emitter, given: Carried) -> tuple[Any, Any, Any]:
    """`fptq.cached_attention` as Attention-23 on all keys and values, decoded as stored."""
    head, bits = given.head, given.bits
    q, k, v = given.q, given.k, given.v
    if k is None:
        sizes = op.ints(given.heads * head, given.kv_heads * head, given.kv_heads * head)
        q, k, v = op.make("Split", q, sizes, outputs=3, axis=2)
    if given.cos is not None:
        q, k = (
            op.make(
                "RotaryEmbedding", x, given.positions, given.cos, given.sin, domain=CONTRIB,
                interleaved=int(given.interleaved), num_heads=heads,
                rotary_embedding_dim=2 * given.cos.shape[1],
            )
            for x, heads in ((q, given.heads), (k, given.kv_heads))
        )
    known = (
        (k, given.past_key, given.key_scale), (v, given.past_value, given.value_scale)
    )
    stored = [
        encode(op, op.Transpose(split_heads(op, x, given.kv_heads, head), perm=[0, 2, 1, 3]),
               scale, bits)
        for x, _, scale in known
    ]
    present = [op.Concat(past, x, axis=2) for (_, past, _), x in zip(known, stored, strict=True)]
    keys, values = (
        decode(op, x, scale, bits, head)
        for x, (_, _, scale) in zip(present, known, strict=True)
    )
    queries = op.Transpose(split_heads(op, q, given.heads, head), perm=[0, 2, 1, 3])
    mixed = op.Transpose(
        attention_in_pieces(op, given, queries, keys, values), perm=[0, 2, 1, 3]
    )
    return op.Reshape(mixed, op.ints(0, 0, given.heads * head)), present[0], present[1]


def _is_single(op: Emitter, given: Carried) -> Any:
    sequence = op.Squeeze(op.Shape(given.positions, start=1, end=2))
    return op.Equal(sequence, op.int(1))


def fused_attention(
    op: Emitter, given: Carried, positions: Any, bias: Any
) -> tuple[Any, Any, Any]:
    """`fptq.cached_attention` as one GroupQueryAttention.

    Without positions and bias it counts from the first key, and sees all up to the query, or
    its window.
    """
    last, length = op.once("lengths", lambda home: _lengths(home, given))
    quantized: dict[str, Any] = {}
    scales: tuple[Any, ...] = ()
    if given.bits < 16:
        quantized = {"k_quant_type": _quant_type(given.key_scale),
                     "v_quant_type": _quant_type(given.value_scale),
                     "kv_cache_bit_width": given.bits}
        scales = (None, given.key_scale, given.value_scale)
    found: tuple[Any, Any, Any] = op.make(
        "GroupQueryAttention",
        given.q, given.k, given.v, given.past_key, given.past_value, last, length,
        given.cos, given.sin, positions, bias, *scales,
        domain=CONTRIB, outputs=3,
        num_heads=given.heads, kv_num_heads=given.kv_heads, scale=given.scale,
        do_rotary=int(given.cos is not None), rotary_interleaved=int(given.interleaved),
        softcap=given.softcap,
        local_window_size=given.window if given.window and bias is None else -1,
        **quantized,
    )
    return found


def _quant_type(scale: Any) -> str:
    """What the operator calls a scale (1, 1, 1, 1), or (1, H_kv, 1, D)."""
    return "PER_TENSOR" if scale.shape.numpy() == (1, 1, 1, 1) else "PER_CHANNEL"


def _lengths(op: Emitter, given: Carried) -> tuple[Any, Any]:
    """(B,) the index of the last key, and the number of keys, both int32."""
    batch, total = op.Shape(given.mask, start=0, end=1), op.Shape(given.mask, start=1, end=2)
    last = op.Cast(op.Expand(op.Sub(total, op.ints(1)), batch), to=INT32)
    return last, op.Cast(op.Squeeze(total), to=INT32)


def unit_rms(op: Emitter, node: ir.Node) -> tuple[Any, Any]:
    """`fptq.unit_rms` as one SimplifiedLayerNormalization, which gives both its results."""
    (x,) = node.inputs
    found: tuple[Any, Any] = _normalization(op, x, None, 0.0, outputs=2)
    return found


def rms_norm(op: Emitter, node: ir.Node) -> tuple[Any]:
    """`fptq.rms_norm` as one SimplifiedLayerNormalization."""
    x, gain = (*node.inputs, None)[:2]
    return (_normalization(op, x, gain, node.attributes["epsilon"].as_float(), outputs=1),)


def _normalization(op: Emitter, x: Any, gain: Any, epsilon: float, outputs: int) -> Any:
    if gain is None:
        width = x.shape[-1]
        gain = op.once(("ones", width), lambda home: home.Constant(value_floats=[1.0] * width))
    return op.make(
        "SimplifiedLayerNormalization", x, gain, outputs=outputs,
        axis=-1, epsilon=epsilon, stash_type=1,
    )


def _integer_linear(
    x: Any, codes: Any, scale: Any, bias: Any, bits: int, block: int, *, forms: Forms
) -> Any:
    """MatMulIntegerToFloat with its bias inside; what has no integer kernel as in `qdq`."""
    quantized = x.producer()
    takes = forms.integer_linears or (bits == 8 and not block and forms.quantized_activations)
    if not takes or quantized is None or quantized.op_type != "DequantizeLinear":
        return qdq.linear(x, codes, scale, bias, bits, block, forms=forms)
    zero = None
    if bits == 4:
        weight = opset.Cast(opset.Cast(codes, to=INT4), to=INT8)
    else:
        weight, zero = qdq.unsigned(codes), qdq.offset(UINT8)
    activation, step, zero_point = quantized.inputs
    return contrib.MatMulIntegerToFloat(
        activation, weight, step, scale, zero_point, zero, bias
    )


def embedding(ids: Any, codes: Any, scale: Any, bits: int) -> Any:
    """GatherBlockQuantized on INT4 codes; others as in `qdq`, where one Gather is as fast."""
    if bits != 4:
        return qdq.embedding(ids, codes, scale, bits)
    width = 2 * codes.shape[1]
    row = max(SMALLEST_BLOCK, 1 << (width - 1).bit_length())
    scales = opset.Unsqueeze(scale, opset.Constant(value_ints=[1]))
    return contrib.GatherBlockQuantized(
        codes, ids, scales, bits=4, block_size=row, gather_axis=0, quantize_axis=1
    )


def translations(program: Program) -> dict[Any, Callable[..., Any]]:
    """The emitters by operator, for torch.onnx.export's custom_translation_table."""
    forms = forms_of(program)

    def emit_linear(x: Any, codes: Any, scale: Any, bias: Any, bits: int, block: int) -> Any:
        return _integer_linear(x, codes, scale, bias, bits, block, forms=forms)

    return qdq.translations(program) | {
        ops.linear: emit_linear,
        ops.embedding: embedding,
        ops.rms_norm: carry_rms_norm,
        ops.unit_rms: carry_unit_rms,
    }


TARGET = Target(
    "ort-cpu",
    translations,
    qdq.EXPANSIONS
    | {"CachedAttention": cached_attention, "RmsNorm": rms_norm, "UnitRms": unit_rms},
    qdq.TARGET.contract,
    packed_projections=True,
    epsilon_channel=True,
    opset=23,
    session_config=qdq.TARGET.session_config,
)
