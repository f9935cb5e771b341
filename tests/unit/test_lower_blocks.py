"""Weights in the blocks of MatMulNBits: ONNX Runtime multiplies by what the codes say."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from fptq_compiler.lower.blocks import BLOCK, pack_blocks, spread_scale, unpack_blocks

FLOAT, UINT8 = onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8
Array = np.ndarray[Any, Any]


def codes_of(inputs: int, outputs: int, bits: int) -> Array:
    half = 1 << (bits - 1)
    return np.random.default_rng(0).integers(-half, half, (inputs, outputs)).astype(np.int8)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("inputs", [64, 48, 33, 3])
def test_unpacking_gives_the_codes_back(inputs: int, bits: int) -> None:
    codes = codes_of(inputs, 5, bits)
    packed = pack_blocks(codes, bits)
    assert packed.dtype == np.uint8
    assert packed.shape == (5, -(-inputs // BLOCK), BLOCK * bits // 8)
    found = unpack_blocks(packed, inputs, bits)
    assert found.dtype == np.int8
    assert np.array_equal(found, codes)


def test_the_even_channel_stands_in_the_low_half() -> None:
    codes = np.zeros((32, 1), np.int8)
    codes[:2, 0] = (-8, 7)
    packed = pack_blocks(codes, 4)
    assert packed[0, 0, 0] == 0xF0
    assert set(packed[0, 0, 1:].tolist()) == {0x88}


@pytest.mark.parametrize(("given", "rows"), [(0, 1), (32, 3), (64, 2), (128, 1)])
def test_a_scale_is_repeated_for_the_blocks_that_it_covers(given: int, rows: int) -> None:
    """80 inputs are three blocks of 32; the last scale of 64 covers half a block only."""
    scale = np.arange(rows * 2, dtype=np.float32).reshape(rows, 2)
    spread = spread_scale(scale if given else scale[0], 80, given, 32)
    assert spread.shape == (3, 2)
    each = np.repeat(spread, 32, 0)[:80]
    assert np.array_equal(each, np.repeat(scale, given or 80, 0)[:80])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("given", [0, 64])
def test_onnx_runtime_multiplies_by_the_weight(given: int, bits: int) -> None:
    inputs, outputs = 80, 6
    generator = np.random.default_rng(1)
    codes = codes_of(inputs, outputs, bits)
    rows = -(-inputs // given) if given else 1
    scale = generator.uniform(0.01, 0.02, (rows, outputs)).astype(np.float32)
    steps = spread_scale(scale if given else scale[0], inputs, given, BLOCK).T.copy()
    tensors = {"B": pack_blocks(codes, bits), "scales": steps}
    node = helper.make_node(
        "MatMulNBits", ["A", "B", "scales"], ["Y"], domain="com.microsoft",
        K=inputs, N=outputs, bits=bits, block_size=BLOCK,
    )
    graph = helper.make_graph(
        [node], "blocks",
        [helper.make_tensor_value_info("A", FLOAT, [3, inputs])],
        [helper.make_tensor_value_info("Y", FLOAT, [3, outputs])],
        [onnx.numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    x = generator.normal(size=(3, inputs)).astype(np.float32)
    (found,) = session.run(None, {"A": x})
    weight = codes * np.repeat(scale, given or inputs, 0)[:inputs]
    # Sums of 80 products in float32; a code or scale out of place changes them by a tenth.
    np.testing.assert_allclose(found, x @ weight, rtol=0, atol=1e-5 * np.abs(found).max())
