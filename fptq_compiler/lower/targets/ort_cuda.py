"""Target `ort-cuda`: the forms that ONNX Runtime's CUDA provider runs in packed and INT8 kernels.

    linear            with quantised activations the function fptq.QuantizedLinear, MatMulInteger
                      on INT8; else com.microsoft.MatMulNBits in blocks of 32
    embedding         com.microsoft.GatherBlockQuantized for INT4, else Gather
    fake_quantize     INT8 codes; the provider has no UINT8 matmul
    rms_norm          RMSNormalization-23, statistics in float32
    attention         Attention-23
    cached_attention  com.microsoft.GroupQueryAttention where nothing is padding, and no batch
                      comes in chunks; else Attention-23 on the decoded cache, for with a
                      quantised cache the other kernel takes no mask

Scales stand in the float type of the file, which holds them exactly (passes.round_scales).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import onnx_ir as ir

from fptq_compiler.graph import ops
from fptq_compiler.graph.program import Program
from fptq_compiler.lower.blocks import BLOCK, BLOCKS, pack_blocks, spread_scale
from fptq_compiler.lower.emitter import Emitter
from fptq_compiler.lower.targets import Target, ort_cpu, ort_cuda_contract, qdq, signed
from fptq_compiler.lower.targets.cache import LOWEST_OF_FLOAT16
from fptq_compiler.lower.targets.carried import (
    WITH_FLOAT32_INSIDE,
    Carried,
    carry_plain_attention,
)
from fptq_compiler.lower.targets.functions import call_quantized_linear, quantized_linear
from fptq_compiler.lower.targets.sums import sum_of_squares
from fptq_compiler.lower.targets.types import INT4
from fptq_compiler.recipe import Recipe

FLOAT_BITS = 16


def translations(program: Program) -> dict[Any, Callable[..., Any]]:
    """The emitters by operator, for torch.onnx.export's custom_translation_table."""
    return qdq.translations(program) | WITH_FLOAT32_INSIDE | {
        ops.fake_quantize: signed.fake_quantize,
        ops.embedding: ort_cpu.embedding,
        ops.attention: carry_plain_attention,
    }


def linear(op: Emitter, node: ir.Node) -> tuple[Any, ...]:
    """In integers where the activation is in codes; the bias is added behind the matmul."""
    x, codes, scale, bias = (*node.inputs, None)[:4]
    assert x is not None
    bits, block = (node.attributes[name].as_int() for name in ("bits", "block"))
    quantized = x.producer()
    if quantized is not None and quantized.op_type == "DequantizeLinear" and not block:
        weight = op.Cast(codes, to=INT4) if bits == 4 else codes
        product = call_quantized_linear(op, quantized, weight, scale)
    else:
        product = _weight_only(op, x, codes, scale, bits, block)
    return (product if bias is None else op.Add(product, bias),)


def _weight_only(op: Emitter, x: Any, codes: Any, scale: Any, bits: int, block: int) -> Any:
    """MatMulNBits without zero-point and bias, either of which keeps it from its fast kernel."""
    inputs, outputs = codes.shape

    def pack(home: Emitter) -> tuple[Any, Any]:
        packed = pack_blocks(codes.const_value.numpy(), bits)
        steps = spread_scale(scale.const_value.numpy(), inputs, block, BLOCK).T.copy()
        return (
            home.initializer(f"{codes.name}{BLOCKS}", packed),
            home.initializer(f"{scale.name}{BLOCKS}", steps),
        )

    weight, steps = op.once(("blocks", codes.name), pack)
    return op.make(
        "MatMulNBits", x, weight, steps, domain=ort_cpu.CONTRIB,
        K=inputs, N=outputs, bits=bits, block_size=BLOCK,
    )


def rms_norm(op: Emitter, node: ir.Node) -> tuple[Any, ...]:
    """RMSNormalization, which has a gain in any case."""
    x, gain = (*node.inputs, None)[:2]
    if gain is None:
        width = qdq.size(x, -1)
        gain = op.once(("ones", width), partial(_ones, width=width))
    return (op.RMSNormalization(x, gain, axis=-1, epsilon=node.attributes["epsilon"].value),)


def _ones(op: Emitter, width: int) -> Any:
    return op.Expand(op.float(1.0), op.ints(width))


def attention(op: Emitter, node: ir.Node) -> tuple[Any, ...]:
    """Attention-23 on (B, H, S, D) and (B, H_kv, T, D)."""
    q, k, v, mask = (*node.inputs, None)[:4]
    numbers: dict[str, Any] = {name: a.value for name, a in node.attributes.items()}
    window = numbers["window"]
    if window:
        near = op.once(("near", window), partial(_near, q=q, k=k, window=window))
        mask = near if mask is None else _both(op, mask, near)
    return (
        op.Attention(
            q, k, v, mask, is_causal=numbers["causal"], scale=numbers["scale"],
            softcap=numbers["softcap"],
        ),
    )


def _near(op: Emitter, q: Any, k: Any, window: int) -> Any:
    """(S, T) booleans: keys that lie less than the window behind the query."""
    sequence, keys = op.Shape(q, start=2, end=3), op.Shape(k, start=2, end=3)
    numbers = op.Range(op.int(0), op.Squeeze(keys), op.int(1))
    queries = op.Unsqueeze(op.Slice(numbers, op.Neg(sequence), keys), op.ints(1))
    return op.Less(op.Sub(queries, numbers), op.int(window))


def _both(op: Emitter, mask: Any, near: Any) -> Any:
    """A mask that hides what either hides."""
    if mask.dtype == ir.DataType.BOOL:
        return op.And(mask, near)
    return op.Where(near, mask, op.float(LOWEST_OF_FLOAT16))


def cached_attention(op: Emitter, node: ir.Node) -> tuple[Any, ...]:
    """The fused kernel, which counts positions and hides the future by itself."""
    return ort_cpu.fused_where(op, Carried.of(node), _nothing_is_hidden, None, None)


def _nothing_is_hidden(op: Emitter, given: Carried) -> Any:
    """No padding, and one token, or no past, or one sequence."""
    batch, total = (op.Shape(given.mask, start=n, end=n + 1) for n in (0, 1))
    sequence = op.Shape(given.positions, start=1, end=2)
    one = op.ints(1)
    shape = op.Or(op.Or(op.Equal(sequence, one), op.Equal(sequence, total)), op.Equal(batch, one))
    least = op.ReduceMin(given.mask, keepdims=0)
    return op.And(op.Equal(least, op.int(1)), op.Squeeze(shape))


def refusal(recipe: Recipe, float_type: str) -> str:
    """What ONNX Runtime has no kernels for."""
    bits = recipe.bits
    in_codes = bits.activations < FLOAT_BITS or (
        bits.cache < FLOAT_BITS and not recipe.cache.enabled
    )
    if float_type == "bfloat16" and in_codes:
        return (
            f"bits {bits} in bfloat16: ONNX Runtime has no QuantizeLinear of bfloat16; use "
            "--dtype float16, or leave the activations in float (--bits 4-16-16)"
        )
    if float_type == "bfloat16" and recipe.cache.enabled and bits.cache == FLOAT_BITS:
        return (
            f"bits {bits} in bfloat16: the cache would be bfloat16, which NumPy cannot hold; use "
            "--dtype float16, or a cache of 8 bits (--bits 4-16-8)"
        )
    return ""


EXPANSIONS = qdq.EXPANSIONS | {
    "Attention": attention,
    "CachedAttention": cached_attention,
    "Linear": linear,
    "RmsNorm": rms_norm,
    "SumOfSquares": sum_of_squares,
}
TARGET = Target(
    "ort-cuda",
    translations,
    EXPANSIONS,
    ort_cuda_contract.broken_promises,
    refusal=refusal,
    functions=(quantized_linear,),
    float_types=("float16", "bfloat16", "float32"),
    packed_projections=True,
    opset=23,
    providers=("CUDAExecutionProvider", "CPUExecutionProvider"),
    session_config={
        "ep.cuda.fpa_intb_gemm": "1",
        # The one moves a bias into MatMulNBits, which then has no fast kernel; the other quantises
        # twice where a Reshape stands in front of a QuantizeLinear.
        "optimization.disable_specified_optimizers": "MatMulNBitsFusion;QDQPropagationTransformer",
    },
)
