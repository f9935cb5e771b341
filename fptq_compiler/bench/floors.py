"""What a call of a language model must move and multiply at least, read off its graph.

Attention's own operations are left out, so that the floor is one for short contexts and long.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx
from onnx import TensorProto, helper

from fptq_compiler.bench.devices import Device
from fptq_compiler.runtime.model_file import ModelFile
from fptq_compiler.runtime.placement import ELEMENTS

MATMULS: Final = (
    "MatMul", "Gemm", "MatMulNBits", "MatMulInteger", "MatMulIntegerToFloat", "QLinearMatMul",
)
INTEGER: Final = ("MatMulInteger", "MatMulIntegerToFloat", "QLinearMatMul")
MOVES: Final = ("DequantizeLinear", "Cast", "CastLike", "Transpose", "Mul", "Identity", "Reshape")
_FOUR_BITS: Final = (TensorProto.INT4, TensorProto.UINT4)


@dataclass(frozen=True)
class Weights:
    """The weights of all matmuls.

    Attributes:
        bytes: as they stand in the file.
        count: how many numbers.
        integer: whether some matmul multiplies integers.
    """

    bytes: float
    count: int
    integer: bool


def least_seconds(file: ModelFile, device: Device, tokens: int, past: int) -> float:
    """Gives the floor of one call of one row.

    Args:
        file: the model.
        device: where it runs.
        tokens: that the call takes in.
        past: positions in the cache before it.
    """
    weights, signature = weights_of(file), file.signature
    moved = weights.bytes
    if signature.cache_type is not None:
        width = np.dtype(ELEMENTS[signature.cache_type][0]).itemsize
        shape = signature.cache_shape(1, past + tokens)
        moved += 2 * signature.layers * math.prod(shape) * width
    return device.floor(moved, 2 * weights.count * tokens, integer=weights.integer)


def weights_of(file: ModelFile) -> Weights:
    """Adds up the matrices that matmuls read; an embedding is gathered and does not count."""
    model = onnx.load(file.path, load_external_data=False)
    matrices = {t.name: t for t in model.graph.initializer if len(t.dims) >= 2}
    producers = {name: node for node in model.graph.node for name in node.output}
    fused = {node.op_type for node in model.graph.node} & set(INTEGER)
    quantized = _reads_codes(model, producers)
    names = {
        found
        for node in model.graph.node
        if node.op_type in MATMULS
        for name in node.input[:2] if name
        for found in _sources(name, producers, matrices)
    }
    total, count = 0.0, 0
    for name in names:
        tensor = matrices[name]
        numbers = math.prod(tensor.dims)
        total += numbers * _bytes_of(tensor.data_type)
        count += numbers * (2 if _is_packed(name, tensor, model) else 1)
    return Weights(total, count, bool(fused) or quantized)


def _sources(
    name: str, producers: dict[str, onnx.NodeProto], matrices: dict[str, TensorProto]
) -> Iterator[str]:
    """The matrix behind a value, through what only moves or widens it."""
    while name not in matrices and name in producers and producers[name].op_type in MOVES:
        name = producers[name].input[0]
    if name in matrices:
        yield name


def _reads_codes(model: onnx.ModelProto, producers: dict[str, onnx.NodeProto]) -> bool:
    """Whether a MatMul reads a DequantizeLinear of activations, which fuses to an integer one."""
    for node in model.graph.node:
        source = producers.get(node.input[0]) if node.op_type == "MatMul" else None
        if source is not None and source.op_type == "DequantizeLinear":
            return True
    return False


def _is_packed(name: str, tensor: TensorProto, model: onnx.ModelProto) -> bool:
    """Whether a MatMulNBits reads it in UINT8, two numbers to a byte."""
    return tensor.data_type == TensorProto.UINT8 and any(
        node.op_type == "MatMulNBits" and name in node.input for node in model.graph.node
    )


def _bytes_of(element: int) -> float:
    if element in _FOUR_BITS:
        return 0.5
    return float(helper.tensor_dtype_to_np_dtype(element).itemsize)
