"""UINT8 activations times INT8 weights: exact also where pairs of products exceed 16 bits.

On x64 without VNNI ONNX Runtime's kernel saturates them unless the session says not to.
"""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from fptq_compiler.lower.contract import optimized_graph, session_options
from fptq_compiler.lower.targets import target_of
from fptq_compiler.runtime.session_file import FULL_PRECISION, SessionFile
from tests.compiling import SMALL, compile_toy, quick

INPUTS, OUTPUTS = 32, 16
HIGHEST = 255
KEY = "session.x64quantprecision"


def qdq_matmul(code: int, path: Path) -> None:
    """Write x (1, INPUTS) in UINT8 steps of 1 times a weight of one INT8 code, as `qdq` does."""
    constants = {
        "step": np.float32(1.0), "zero": np.uint8(0), "scale": np.ones(OUTPUTS, np.float32),
        "weight": np.full((INPUTS, OUTPUTS), code, np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "step", "zero"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "step", "zero"], ["activation"]),
        helper.make_node("DequantizeLinear", ["weight", "scale"], ["wide"], axis=1),
        helper.make_node("MatMul", ["activation", "wide"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "saturation",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, INPUTS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, OUTPUTS])],
        [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)


@pytest.mark.parametrize("code", [127, -128, 7, -8])
def test_the_largest_codes_are_summed_exactly(code: int, tmp_path: Path) -> None:
    path = tmp_path / "matmul.onnx"
    qdq_matmul(code, path)
    session = onnxruntime.InferenceSession(
        path, session_options(FULL_PRECISION), providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {"x": np.full((1, INPUTS), HIGHEST, np.float32)})
    np.testing.assert_array_equal(found, np.float32(HIGHEST * code * INPUTS))


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="other processors have no such kernel"
)
@pytest.mark.parametrize(("code", "kind"), [(127, "UINT8"), (7, "INT8")])
def test_only_weights_that_could_saturate_are_changed(
    code: int, kind: str, tmp_path: Path
) -> None:
    qdq_matmul(code, tmp_path / "matmul.onnx")
    optimized = optimized_graph(tmp_path / "matmul.onnx", tmp_path, FULL_PRECISION)
    (fused,) = [n for n in optimized.graph if n.op_type == "MatMulIntegerToFloat"]
    weight = fused.inputs[1]
    assert weight is not None
    assert weight.const_value is not None
    assert weight.const_value.dtype.name == kind


@pytest.mark.parametrize("target", ["qdq", "ort-cpu"])
def test_a_session_file_says_so(target: str, tmp_path: Path) -> None:
    assert target_of(target).session_config[KEY] == "1"
    compiled = compile_toy(SMALL, quick("4-8-8", target=target), tmp_path / "toy.onnx")
    assert SessionFile.read(compiled.path).session_config[KEY] == "1"
