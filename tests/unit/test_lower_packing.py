"""Codes in INT8 behind a Cast become initialisers of two codes a byte."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from fptq_compiler.lower.packing import pack_int4

Codes = np.ndarray[tuple[int, ...], np.dtype[np.int8]]
INT4 = onnx.TensorProto.INT4


def model_of(codes: Codes, *, readers: int = 1, to: int = INT4) -> ir.Model:
    """`codes` through a Cast for each reader."""
    nodes, outputs = [], []
    for n in range(readers):
        nodes.append(onnx.helper.make_node("Cast", ["codes"], [f"narrow{n}"], to=to))
        nodes.append(onnx.helper.make_node("DequantizeLinear", [f"narrow{n}", "step"], [f"y{n}"]))
        outputs.append(f"y{n}")
    graph = onnx.helper.make_graph(
        nodes,
        "codes",
        [],
        [
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, codes.shape)
            for name in outputs
        ],
        [
            onnx.numpy_helper.from_array(codes, "codes"),
            onnx.numpy_helper.from_array(np.float32(0.5), "step"),
        ],
    )
    opset = onnx.helper.make_opsetid("", 21)
    return ir.from_proto(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10))


def codes_of(shape: tuple[int, ...]) -> Codes:
    generator = np.random.default_rng(0)
    return generator.integers(-8, 8, shape).astype(np.int8)


@pytest.mark.parametrize("shape", [(4, 6), (3, 5), (1, 1), (7,)])
def test_two_codes_a_byte_low_half_first(shape: tuple[int, ...]) -> None:
    codes = codes_of(shape)
    model = model_of(codes)
    assert pack_int4(model) == 1
    assert [node.op_type for node in model.graph] == ["DequantizeLinear"]
    (packed,) = (t for t in ir.to_proto(model).graph.initializer if t.name == "codes")
    assert packed.data_type == INT4
    flat = np.append(codes.reshape(-1), np.zeros(codes.size % 2, np.int8)).view(np.uint8) & 15
    assert packed.raw_data == (flat[0::2] | flat[1::2] << 4).tobytes()
    assert np.array_equal(onnx.numpy_helper.to_array(packed), codes.astype(ml_dtypes.int4))


def test_the_name_stays_and_the_wide_codes_go() -> None:
    model = model_of(codes_of((4, 6)))
    pack_int4(model)
    assert set(model.graph.initializers) == {"codes", "step"}
    assert all(name == value.name for name, value in model.graph.initializers.items())
    onnx.checker.check_model(ir.to_proto(model))


def test_packing_twice_changes_nothing() -> None:
    model = model_of(codes_of((4, 6)))
    pack_int4(model)
    before = ir.to_proto(model).SerializeToString()
    assert pack_int4(model) == 0
    assert ir.to_proto(model).SerializeToString() == before


def test_another_cast_is_left_alone() -> None:
    model = model_of(codes_of((4, 6)), to=onnx.TensorProto.INT32)
    assert pack_int4(model) == 0
    assert [node.op_type for node in model.graph] == ["Cast", "DequantizeLinear"]


@pytest.mark.parametrize("wrong", [8, -9])
def test_codes_that_do_not_fit_are_named(wrong: int) -> None:
    codes = codes_of((4, 6))
    codes[2, 3] = wrong
    with pytest.raises(ValueError, match=rf"codes: codes .*{wrong}.* do not fit INT4"):
        pack_int4(model_of(codes))


def test_codes_that_are_read_twice_are_all_packed() -> None:
    model = model_of(codes_of((4, 6)), readers=2)
    assert pack_int4(model) == 1  # one initialiser, which both read
    assert [node.op_type for node in model.graph] == ["DequantizeLinear"] * 2
    onnx.checker.check_model(ir.to_proto(model))
