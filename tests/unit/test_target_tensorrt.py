"""Target tensorrt: its node forms, what it refuses, and that its files run as the simulation.

TensorRT itself is not here. The forms are those of its documentation; the CPU provider runs them,
slowly, and says that they compute what they should.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from fptq_compiler.errors import LoweringError, RecipeError
from fptq_compiler.graph import ops
from fptq_compiler.lower.targets import float_type_of
from fptq_compiler.lower.targets.tensorrt_contract import broken_promises
from fptq_compiler.recipe import Bits, Recipe, WeightsRecipe
from fptq_compiler.runtime.session import load
from fptq_compiler.runtime.session_file import SessionFile
from tests.compiling import Compiled, CompileForGpu, compile_toy, gpu_compiler, quick
from tests.decoding import decode, error, random_ids
from tests.onnx_nodes import attributes, nodes
from tests.toys import ToyConfig

TOY = ToyConfig(layers=1, hidden=64, mlp=128, head_dim=16)
LINEARS = 8  # q k v o, gate up down, and the head
CLOSE = 1e-4  # of the largest logit, as in lower.parity
TYPES = onnx.TensorProto


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> CompileForGpu:
    return gpu_compiler(TOY, "tensorrt", tmp_path_factory.mktemp)


def weights_of(compiled: Compiled) -> list[onnx.NodeProto]:
    """The DequantizeLinear that reads the weight of each linear."""
    tensors = compiled.initializers()
    found = [n for n in nodes(compiled.model, "DequantizeLinear") if n.input[0] in tensors]
    assert len(found) == LINEARS
    return found


def test_weights_are_int4_in_blocks(toy: CompileForGpu) -> None:
    """128 where that divides the input channels, else 64; one scale, repeated, is as before."""
    compiled = toy("4-8-8", "float16")
    tensors = compiled.initializers()
    blocks: Counter[tuple[int, int]] = Counter()
    for node, linear in zip(weights_of(compiled), compiled.program.call_nodes(ops.linear),
                            strict=True):
        scale = compiled.program.parameter(str(linear.args[2].target)).numpy()  # type: ignore[union-attr]
        codes = tensors[node.input[0]]
        inputs, outputs = codes.dims
        steps = onnx.numpy_helper.to_array(tensors[node.input[1]])
        assert len(node.input) == 2
        assert steps.dtype == np.float16
        if codes.data_type == TYPES.INT8:
            assert attributes(node) == {"axis": 1}
            continue
        assert codes.data_type == TYPES.INT4
        block = attributes(node)["block_size"]
        assert attributes(node) == {"axis": 0, "block_size": block}
        blocks[inputs, block] += 1
        assert np.array_equal(steps.astype(np.float32), np.tile(scale, (inputs // block, 1)))
        assert steps.shape == (inputs // block, outputs)
    assert blocks == {(64, 64): 6, (128, 128): 1}


def test_activations_are_symmetric_int8(toy: CompileForGpu) -> None:
    compiled = toy("4-8-8", "float16")
    producers = {n.output[0]: n for n in compiled.model.graph.node}
    quantizers = nodes(compiled.model, "QuantizeLinear")
    assert len(quantizers) == 5 + 2  # inputs of linears, keys and values
    for node in quantizers:
        zero = onnx.numpy_helper.to_array(attributes(producers[node.input[2]])["value"])
        assert (zero.dtype, zero.item()) == (np.int8, 0)
    matmuls = {n.input[1]: n for n in nodes(compiled.model, "MatMul")}
    for weight in weights_of(compiled):
        assert producers[matmuls[weight.output[0]].input[0]].op_type == "DequantizeLinear"


@pytest.mark.parametrize("cached", [False, True])
def test_the_file_is_standard_onnx(toy: CompileForGpu, cached: bool) -> None:
    model = toy("4-8-8", "float32" if cached else "float16", cached=cached).model
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 21)]
    assert {n.domain for n in model.graph.node} == {""}
    assert not nodes(model, "If")
    assert not model.functions


def test_sums_of_squares_are_computed_in_float32(toy: CompileForGpu) -> None:
    model = toy("4-8-8", "float16").model
    producers = {n.output[0]: n for n in model.graph.node}
    sums = nodes(model, "ReduceSumSquare")
    assert len(sums) == 3
    for node in sums:
        cast = producers[node.input[0]]
        assert (cast.op_type, attributes(cast)) == ("Cast", {"to": TYPES.FLOAT})


def test_it_runs_as_the_simulation(toy: CompileForGpu) -> None:
    """Chunks and tokens of a cached file in float32, against whole sequences in torch."""
    compiled = toy("4-8-8", "float32", cached=True)
    model = load(compiled.path, provider="CPUExecutionProvider", threads=1)
    ids = random_ids(2, 10)
    expected = compiled.program.run(torch.from_numpy(ids)).numpy()
    for bounds in ([0, 10], [0, 4, 5, 6, 10]):
        assert error(decode(model, ids, bounds)[0], expected) <= CLOSE


def test_float16_is_compared_twice(toy: CompileForGpu) -> None:
    parity = toy("4-8-8", "float16").report.parity
    assert parity["activation codes wrong"] == parity["float16: activation codes wrong"] == 0
    roundings = float(np.finfo(np.float16).eps) * LINEARS**0.5
    assert 0 < float(parity["float16: logits, relative"]) <= roundings


def test_the_session_file(toy: CompileForGpu) -> None:
    found = SessionFile.read(toy("4-8-8", "float16").path)
    assert found.target == "tensorrt"
    assert found.providers == (
        "TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bits": Bits(4, 4, 8)}, "bits 4-4-8: TensorRT has no INT4 activations"),
        ({"bits": Bits(4, 8, 4)}, "bits 4-8-4: TensorRT has no INT4 keys and values"),
        ({"weights": WeightsRecipe(block=32)}, "weights.block is 32; .* blocks of 64 or 128"),
        (
            {"bits": Bits(8, 8, 8), "weights": WeightsRecipe(block=64)},
            "weights.block is 64; TensorRT takes INT8 weights with a scale a channel",
        ),
        ({"dtype": "bfloat16"}, "target tensorrt computes in float16 or float32"),
    ],
)
def test_what_tensorrt_cannot_do_is_refused(changes: dict[str, Any], words: str) -> None:
    recipe = replace(Recipe(target="tensorrt"), **changes)
    with pytest.raises(RecipeError, match=words):
        float_type_of(recipe)


def test_channels_that_make_no_whole_blocks_are_refused(tmp_path: Path) -> None:
    recipe = quick("4-16-16", target="tensorrt", verify="off")
    words = r"weight_codes has 48 input channels; .* whole blocks of 128 or 64"
    with pytest.raises(LoweringError, match=words):
        compile_toy(replace(TOY, mlp=48), recipe, tmp_path / "toy.onnx")
    assert list(tmp_path.iterdir()) == []


# The contract.


def broken(compiled: Compiled, model: onnx.ModelProto) -> list[str]:
    written = ir.from_proto(model)
    return broken_promises(compiled.program, written, written)


def test_the_written_file_keeps_the_contract(toy: CompileForGpu) -> None:
    compiled = toy("4-8-8", "float16")
    assert broken(compiled, compiled.model) == []


def test_an_asymmetric_zero_point_breaks_it(toy: CompileForGpu) -> None:
    compiled = toy("4-8-8", "float16")
    model = compiled.model
    name = nodes(model, "QuantizeLinear")[0].input[2]
    (zero,) = (n for n in model.graph.node if name in n.output)
    zero.attribute[0].t.CopyFrom(onnx.numpy_helper.from_array(np.array(3, np.int8)))
    (words,) = broken(compiled, model)
    assert "QuantizeLinear with zero-point INT8 3, expected INT8 0" in words


def test_another_block_breaks_it(toy: CompileForGpu) -> None:
    compiled = toy("4-8-8", "float16")
    model = compiled.model
    (name, *_) = (n.output[0] for n in weights_of(compiled))
    (node,) = (n for n in model.graph.node if name in n.output)
    next(a for a in node.attribute if a.name == "block_size").i = 32
    (words,) = broken(compiled, model)
    assert "INT4 weight in blocks of 32 with 2 inputs, expected blocks of 64 or 128" in words


def test_a_linear_in_float_breaks_it(toy: CompileForGpu) -> None:
    """The activation of one linear without its codes."""
    compiled = toy("4-8-8", "float16")
    model = compiled.model
    producers = {n.output[0]: n for n in model.graph.node}
    tensors = compiled.initializers()
    matmul = next(
        n for n in nodes(model, "MatMul")
        if n.input[1] in producers and producers[n.input[1]].input[0] in tensors
    )
    dequantize = producers[matmul.input[0]]
    matmul.input[0] = producers[dequantize.input[0]].input[0]
    (words,) = broken(compiled, model)
    assert words.startswith("7 of them behind an activation in codes, expected 8")
