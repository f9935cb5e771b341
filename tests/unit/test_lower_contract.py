"""What ONNX Runtime makes of a file is counted, and a broken promise is said in words."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest

from fptq_compiler.errors import LoweringError
from fptq_compiler.lower.contract import Contract, contract_of, count_kernels, optimized_graph
from fptq_compiler.runtime.session_file import FULL_PRECISION
from tests.compiling import SMALL, Compiled, compile_toy, quick

LINEARS = 8  # of one block: q k v o, gate up down, and the head


@pytest.fixture(scope="module", params=["4-8-8", "4-16-16", "16-16-16"])
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    path = tmp_path_factory.mktemp("contract") / "toy.onnx"
    return compile_toy(SMALL, quick(request.param), path)


def expected_of(compiled: Compiled) -> Contract:
    if compiled.recipe.bits.weights == 16:
        return Contract(0, 0)
    if compiled.recipe.bits.activations == 16:
        return Contract(0, LINEARS - 1)  # the head's INT8 is faster in float than by blocks
    return Contract(LINEARS, 0)


def test_the_program_says_what_to_expect(compiled: Compiled) -> None:
    assert contract_of(compiled.program) == expected_of(compiled)


def test_the_written_file_keeps_the_contract(compiled: Compiled, tmp_path: Path) -> None:
    kernels, int4 = count_kernels(optimized_graph(compiled.path, tmp_path, FULL_PRECISION))
    assert contract_of(compiled.program).check(kernels, int4) == []
    assert list(tmp_path.iterdir()) == []  # the optimised copy is gone


def read_int4_directly(path: Path, target: Path) -> None:
    """The naive form: DequantizeLinear on INT4 in place of the widening Cast, then MatMul."""
    model = onnx.load(path)
    int4 = {t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT4}
    casts = [n for n in model.graph.node if n.op_type == "Cast" and n.input[0] in int4]
    assert len(casts) == len(int4) > 0
    narrow = {cast.output[0]: cast.input[0] for cast in casts}
    for cast in casts:
        model.graph.node.remove(cast)
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = narrow.get(name, name)
    onnx.checker.check_model(model)
    onnx.save(model, target)


@pytest.mark.parametrize("compiled", ["4-8-8"], indirect=True)
def test_the_naive_form_breaks_it(compiled: Compiled, tmp_path: Path) -> None:
    path = tmp_path / "naive.onnx"
    read_int4_directly(compiled.path, path)
    kernels, int4 = count_kernels(optimized_graph(path, tmp_path, FULL_PRECISION))
    assert int4 == LINEARS - 1
    fused, dequantized = contract_of(compiled.program).check(kernels, int4)
    assert fused == (
        "1 fused integer matmuls (MatMulIntegerToFloat, QLinearMatMul, QGemm), expected 8, one "
        "for each quantised linear"
    )
    assert dequantized == "7 DequantizeLinear read an INT4 weight on every run, expected none"


def test_each_kind_of_count_has_its_words() -> None:
    contract = Contract(3, 2)
    kernels = Counter(MatMulIntegerToFloat=1, QLinearMatMul=1, QGemm=1, MatMulNBits=2)
    assert contract.check(kernels, 0) == []
    assert contract.check(kernels - Counter(QGemm=1), 0)[0].startswith("2 fused integer matmuls")
    assert "3 MatMulNBits, expected 2" in contract.check(kernels + Counter(MatMulNBits=1), 0)[0]
    assert len(contract.check(Counter(), 4)) == 3


def test_a_file_that_the_runtime_refuses(tmp_path: Path) -> None:
    node = onnx.helper.make_node("NoSuchOperator", ["x"], ["y"], domain="nowhere")
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([node], "refused", [value], [result])
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("nowhere", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.save(model, tmp_path / "refused.onnx")
    with pytest.raises(LoweringError, match=r"cannot load the written file: .*NoSuchOperator"):
        optimized_graph(tmp_path / "refused.onnx", tmp_path, FULL_PRECISION)
