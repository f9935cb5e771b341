"""A model in half precision: what changes its type, what stays, and that it computes the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import helper

from fptq_compiler.errors import LoweringError
from fptq_compiler.lower.expand import expand
from fptq_compiler.lower.float_type import convert
from fptq_compiler.lower.targets.carried import DOMAIN
from fptq_compiler.lower.targets.sums import sum_of_squares

HALF = ir.DataType.FLOAT16
FLOAT, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
Array = np.ndarray[Any, Any]


def model_of(
    nodes: list[onnx.NodeProto], weights: dict[str, Array] | None = None, *, ids: bool = False
) -> ir.Model:
    """From x (2, 4), or ids (2, 4) with `ids`, to y."""
    graph = helper.make_graph(
        nodes, "small",
        [helper.make_tensor_value_info("x", INT64 if ids else FLOAT, [2, 4])],
        [helper.make_tensor_value_info("y", FLOAT, [2, 4])],
        [onnx.numpy_helper.from_array(v, k) for k, v in (weights or {}).items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))
    for node in model.graph:  # as the exporter leaves them
        integer = node.op_type == "Cast" and node.attributes["to"].as_int() == INT64
        for value in node.outputs:
            value.type = ir.TensorType(ir.DataType.INT64 if integer else ir.DataType.FLOAT)
    return model


def node(op_type: str, *inputs: str, to: str, domain: str = "", **attributes: Any) -> Any:
    return helper.make_node(op_type, inputs, [to], domain=domain, **attributes)


def run(model: ir.Model, x: Array) -> Array:
    options = onnxruntime.SessionOptions()
    # As written: on CPU float16 is computed in float32 where Casts between operators are removed.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {"x": x})
    return np.asarray(found)


def test_everything_changes_its_type() -> None:
    model = model_of(
        [
            node("Constant", to="two", value_float=2.0),
            node("Mul", "x", "two", to="doubled"),
            node("Add", "doubled", "shift", to="y"),
        ],
        {"shift": np.array([1, 2, 3, 4], np.float32)},
    )
    convert(model, HALF)
    assert model.graph.inputs[0].dtype == HALF
    assert model.graph.outputs[0].dtype == HALF
    assert model.graph.initializers["shift"].dtype == HALF
    x = np.arange(8, dtype=np.float16).reshape(2, 4)
    found = run(model, x)
    assert found.dtype == np.float16
    assert np.array_equal(found, 2 * x + np.array([1, 2, 3, 4], np.float16))


def test_integers_stay_and_casts_follow() -> None:
    model = model_of(
        [
            helper.make_node("Cast", ["x"], ["floats"], to=FLOAT),
            node("Mul", "floats", "step", to="y"),
        ],
        {"step": np.array(0.5, np.float32)}, ids=True,
    )
    convert(model, HALF)
    assert model.graph.inputs[0].dtype == ir.DataType.INT64
    assert next(iter(model.graph)).attributes["to"].as_int() == HALF.value
    assert run(model, np.ones((2, 4), np.int64)).dtype == np.float16


def test_a_constant_that_hides_keys_saturates() -> None:
    model = model_of([node("Constant", to="lowest", value_float=-3e38),
                      node("Add", "x", "lowest", to="y")])
    convert(model, HALF)
    found = run(model, np.zeros((2, 4), np.float16))
    assert np.array_equal(found, np.full((2, 4), -65504, np.float16))


def test_a_weight_that_does_not_fit_is_named() -> None:
    model = model_of([node("Mul", "x", "gain", to="y")], {"gain": np.float32([1, 7e4, 1, 1])})
    with pytest.raises(LoweringError, match=r"gain holds 7e\+04, expected at most 6\.55e\+04"):
        convert(model, HALF)


def normalized() -> ir.Model:
    """x / sqrt(sum of squares + 1e-7), the way S_n is written."""
    return model_of(
        [
            node("SumOfSquares", "x", to="sum", domain=DOMAIN),
            node("Constant", to="tiny", value_float=1e-7),
            node("Add", "sum", "tiny", to="shifted"),
            node("Sqrt", "shifted", to="root"),
            node("Reciprocal", "root", to="inverse"),
            node("Mul", "x", "inverse", to="y"),
        ],
    )


def test_sums_of_squares_stay_in_float32_until_they_meet_a_value() -> None:
    """300² leaves float16, and so would 1e-7 on its way to zero."""
    model = normalized()
    convert(model, HALF)
    expand(model, {"SumOfSquares": sum_of_squares}, HALF.value)
    types = {str(v.name): v.dtype for n in model.graph for v in n.outputs}
    assert types["shifted"] == types["root"] == types["inverse"] == ir.DataType.FLOAT
    assert types["tiny"] == ir.DataType.FLOAT
    x = np.float16([[300, 400, 0, 1200], [3e-4, 4e-4, 0, 1.2e-3]])
    wide = x.astype(np.float32)
    expected = wide / np.sqrt((wide**2).sum(-1, keepdims=True) + 1e-7)
    # Two roundings, of the factor and of the product, each of at most half an epsilon.
    np.testing.assert_allclose(run(model, x), expected, rtol=float(np.finfo(np.float16).eps))


def test_in_float32_nothing_is_cast() -> None:
    model = normalized()
    expand(model, {"SumOfSquares": sum_of_squares})
    assert "Cast" not in {n.op_type for n in model.graph}


def test_angles_stay_in_float32() -> None:
    """The cosine of 1,000: float16 has whole numbers there, and would be off by anything."""
    model = model_of(
        [
            helper.make_node("Cast", ["x"], ["places"], to=FLOAT),
            node("Mul", "places", "frequency", to="angles"),
            node("Cos", "angles", to="waves"),
            node("Mul", "waves", "frequency", to="y"),
        ],
        {"frequency": np.array(0.7071, np.float32)}, ids=True,
    )
    convert(model, HALF)
    types = {str(v.name): v.dtype for n in model.graph for v in n.outputs}
    assert types["places"] == types["angles"] == types["waves"] == ir.DataType.FLOAT
    assert types["y"] == HALF
    x = np.array([[0, 1, 1000, 2047], [4000, 8191, 5, 6]])
    expected = np.cos(x * np.float32(0.7071)) * 0.7071
    # Rounded thrice, to at most 2^-11 of a number below one; the angles are of 5,800.
    np.testing.assert_allclose(run(model, x), expected, atol=1.5e-3)


def test_bfloat16_gives_logits_in_float32() -> None:
    model = model_of([node("Add", "x", "x", to="y")])
    convert(model, ir.DataType.BFLOAT16)
    (output,) = model.graph.outputs
    assert (output.name, output.dtype) == ("y", ir.DataType.FLOAT)
    assert [n.op_type for n in model.graph] == ["Add", "Cast"]
    assert model.graph.inputs[0].dtype == ir.DataType.BFLOAT16
    onnx.checker.check_model(ir.to_proto(model))
