"""Target `tensorrt`: standard ONNX, opset 21, in the forms that TensorRT has kernels for.

    linear            DequantizeLinear of INT4 in blocks of 128 or 64 input channels, or of INT8
                      per output channel, into MatMul
    fake_quantize     QuantizeLinear and DequantizeLinear on INT8, symmetric
    rms_norm          in standard operators, statistics in float32
    attention         MatMul, Softmax, MatMul
    cached_attention  in standard operators, softmax in float32

TensorRT fuses quantised pairs into its kernels by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir

from fptq_compiler.errors import LoweringError
from fptq_compiler.graph import ops
from fptq_compiler.graph.program import Program
from fptq_compiler.lower.blocks import BLOCKS, spread_scale
from fptq_compiler.lower.emitter import Emitter
from fptq_compiler.lower.targets import Target, qdq, signed, tensorrt_contract
from fptq_compiler.lower.targets.carried import WITH_FLOAT32_INSIDE
from fptq_compiler.lower.targets.sums import sum_of_squares
from fptq_compiler.lower.targets.types import INT4
from fptq_compiler.recipe import Recipe

SIZES = (128, 64)


def translations(program: Program) -> dict[Any, Callable[..., Any]]:
    """The emitters by operator, for torch.onnx.export's custom_translation_table."""
    return qdq.translations(program) | WITH_FLOAT32_INSIDE | {
        ops.fake_quantize: signed.fake_quantize
    }


def linear(op: Emitter, node: ir.Node) -> tuple[Any, ...]:
    """MatMul on a weight that is dequantised in front of it."""
    x, codes, scale, bias = (*node.inputs, None)[:4]
    bits, block = (node.attributes[name].as_int() for name in ("bits", "block"))
    if bits == 4:
        block, steps = _blocks(op, codes, scale, block)
        weight = op.DequantizeLinear(op.Cast(codes, to=INT4), steps, axis=0, block_size=block)
    else:
        weight = op.DequantizeLinear(codes, scale, axis=1)
    product = op.MatMul(x, weight)
    return (product if bias is None else op.Add(product, bias),)


def _blocks(op: Emitter, codes: Any, scale: Any, given: int) -> tuple[int, Any]:
    """The size of a block, and the scale of each: one scale, repeated, is the same weight.

    Raises:
        LoweringError: the input channels cannot be cut into such blocks.
    """
    inputs = codes.shape[0]
    sizes = (given,) if given else SIZES
    block = next((size for size in sizes if inputs % size == 0), 0)
    if not block:
        message = (
            f"{codes.name} has {inputs} input channels; TensorRT takes INT4 weights in whole "
            f"blocks of {' or '.join(str(s) for s in sizes)}. Use --bits 8-8-8, or another target."
        )
        raise LoweringError(message)

    def spread(home: Emitter) -> Any:
        values = spread_scale(scale.const_value.numpy(), inputs, given, block)
        return home.initializer(f"{scale.name}{BLOCKS}", values)

    return block, op.once(("blocks", scale.name), spread)


def rms_norm(op: Emitter, node: ir.Node) -> tuple[Any, ...]:
    """X / sqrt(mean(x^2) + epsilon) in float32, times the gain where there is one."""
    x, gain = (*node.inputs, None)[:2]
    wide = op.wide(x)
    mean = op.ReduceMean(op.Mul(wide, wide), op.ints(-1), keepdims=1)
    shifted = op.Add(mean, op.float32(node.attributes["epsilon"].value))
    normalized = op.narrow(op.Div(wide, op.Sqrt(shifted)))
    return (normalized if gain is None else op.Mul(normalized, gain),)


def refusal(recipe: Recipe, float_type: str) -> str:
    """What TensorRT has no kernels for."""
    bits, block = recipe.bits, recipe.weights.block
    if bits.activations == 4:
        return (
            f"bits {bits}: TensorRT has no INT4 activations; give activations 8 bits, or use "
            "--target ort-cuda"
        )
    if bits.cache == 4:
        return (
            f"bits {bits}: TensorRT has no INT4 keys and values; give the KV cache 8 bits, or "
            "use --target ort-cuda"
        )
    if block and bits.weights == 8:
        return f"weights.block is {block}; TensorRT takes INT8 weights with a scale a channel"
    if block and block not in SIZES:
        return f"weights.block is {block}; TensorRT takes INT4 weights in blocks of 64 or 128"
    return ""


EXPANSIONS = qdq.EXPANSIONS | {
    "Linear": linear, "RmsNorm": rms_norm, "SumOfSquares": sum_of_squares,
}
TARGET = Target(
    "tensorrt",
    translations,
    EXPANSIONS,
    tensorrt_contract.broken_promises,
    refusal=refusal,
    float_types=("float16", "float32"),
    symmetric_activations=True,
    # Where the CPU provider runs the file: it would make UINT8 of one side of INT8 keys.
    session_config={
        "optimization.disable_specified_optimizers":
        "QDQPropagationTransformer;QDQS8ToU8Transformer",
    },
    providers=("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"),
)
