"""Initialisers that are equal become one; small ones and named ones keep to themselves."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from fptq_compiler.lower.share import share_equal

TABLE = np.arange(512, dtype=np.float32)


def model_of(**values: npt.NDArray[np.generic]) -> ir.Model:
    """Each value through an Identity of its own."""
    helper = onnx.helper
    graph = helper.make_graph(
        [helper.make_node("Identity", [name], [f"{name}_out"]) for name in values],
        "equal",
        [],
        [
            helper.make_tensor_value_info(
                f"{name}_out", helper.np_dtype_to_tensor_dtype(value.dtype), value.shape
            )
            for name, value in values.items()
        ],
        [onnx.numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    opset = helper.make_opsetid("", 21)
    return ir.from_proto(helper.make_model(graph, opset_imports=[opset], ir_version=10))


def readers(model: ir.Model) -> list[str]:
    return [str(value.name) for node in model.graph for value in node.inputs if value]


def test_the_first_of_equals_stays() -> None:
    model = model_of(a=TABLE, b=TABLE + 1, c=TABLE, d=TABLE)
    assert share_equal(model) == 2
    assert set(model.graph.initializers) == {"a", "b"}
    assert readers(model) == ["a", "b", "a", "a"]
    onnx.checker.check_model(ir.to_proto(model))


def test_twice() -> None:
    model = model_of(a=TABLE, b=TABLE)
    share_equal(model)
    assert share_equal(model) == 0


def test_near_misses() -> None:
    """Another type or shape with the same bytes, a few bytes, and a name that is to stay."""
    others = {"b": TABLE.view(np.int32), "c": TABLE.reshape(2, 256)}
    assert share_equal(model_of(a=TABLE, **others)) == 0
    assert share_equal(model_of(a=TABLE[:255], b=TABLE[:255])) == 0
    assert share_equal(model_of(a=TABLE[:256], b=TABLE[:256])) == 1
    assert share_equal(model_of(a=TABLE, b=TABLE), apart={"b"}) == 0
