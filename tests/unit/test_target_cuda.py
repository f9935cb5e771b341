"""Target ort-cuda: its node forms, its float types, and that its files run as the simulation."""

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
from onnx_ir.passes.common import InlinePass

from fptq_compiler.errors import RecipeError
from fptq_compiler.graph import ops
from fptq_compiler.lower.blocks import unpack_blocks
from fptq_compiler.lower.contract import optimized_graph
from fptq_compiler.lower.parity import check_half_parity
from fptq_compiler.lower.targets import float_type_of
from fptq_compiler.lower.targets.ort_cuda import TARGET
from fptq_compiler.lower.targets.ort_cuda_contract import broken_promises
from fptq_compiler.recipe import Bits, CacheRecipe, Recipe, WeightsRecipe
from fptq_compiler.runtime.session import load
from fptq_compiler.runtime.session_file import SessionFile
from tests.compiling import CACHE_LENGTH, Compiled, CompileForGpu, compile_toy, gpu_compiler, quick
from tests.decoding import decode, error, random_ids
from tests.onnx_nodes import attributes, every_node, nodes
from tests.toys import ToyConfig

TOY = ToyConfig(layers=1, hidden=32, mlp=48, head_dim=16)
LINEARS = 8  # q k v o, gate up down, and the head
PACKED = 6  # of a file with a cache, where q, k and v are one
CLOSE = 1e-4  # of the largest logit, as in lower.parity
TYPES = onnx.TensorProto


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> CompileForGpu:
    return gpu_compiler(TOY, "ort-cuda", tmp_path_factory.mktemp)


def constant(model: onnx.ModelProto, name: str) -> np.ndarray[Any, Any]:
    (found,) = (n for n in model.graph.node if name in n.output)
    return onnx.numpy_helper.to_array(attributes(found)["value"])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_an_int4_table_is_read_by_one_kernel(dtype: str, tmp_path: Path) -> None:
    tables = WeightsRecipe(embedding_bits=4, head_bits=4)
    recipe = replace(quick("4-8-8", target="ort-cuda", dtype=dtype, verify="off"), weights=tables)
    model = compile_toy(TOY, recipe, tmp_path / "toy.onnx").model
    (gather,) = nodes(model, "GatherBlockQuantized")
    stored = {t.name: t for t in model.graph.initializer}
    assert list(stored[gather.input[0]].dims) == [TOY.vocabulary, TOY.hidden // 2]
    assert not nodes(model, "BitwiseAnd")


# Linears.


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weight_only_linears_are_packed_in_blocks_of_32(toy: CompileForGpu, dtype: str) -> None:
    """Without zero-points and bias, each of which keeps the operator from its fast kernel."""
    compiled = toy("4-16-16", dtype)
    found = nodes(compiled.model, "MatMulNBits")
    assert len(found) == LINEARS
    linears = compiled.program.call_nodes(ops.linear)
    tensors = compiled.initializers()
    for node, linear in zip(found, linears, strict=True):
        codes = compiled.program.parameter(str(linear.args[1].target)).numpy()  # type: ignore[union-attr]
        scale = compiled.program.parameter(str(linear.args[2].target)).numpy()  # type: ignore[union-attr]
        inputs, outputs = codes.shape
        assert attributes(node) == {
            "K": inputs, "N": outputs, "bits": linear.args[4], "block_size": 32
        }
        assert len(node.input) == 3
        packed, steps = (onnx.numpy_helper.to_array(tensors[n]) for n in node.input[1:])
        assert np.array_equal(unpack_blocks(packed, inputs, attributes(node)["bits"]), codes)
        assert tensors[node.input[2]].data_type == getattr(TYPES, dtype.upper())
        assert np.array_equal(steps.astype(np.float32), np.tile(scale, (-(-inputs // 32), 1)).T)
    # Bias correction gives the seven inner linears a bias.
    readers = {i: n.op_type for n in compiled.model.graph.node for i in n.input}
    last = "Cast" if dtype == "bfloat16" else None  # to logits that NumPy can hold
    assert Counter(readers.get(n.output[0]) for n in found) == {"Add": 7, last: 1}
    assert not nodes(compiled.model, "QuantizeLinear")
    assert not compiled.model.functions


@pytest.mark.parametrize(("bits", "clipped"), [("4-8-8", 0), ("4-4-4", 4)])
def test_quantised_linears_are_integer(toy: CompileForGpu, bits: str, clipped: int) -> None:
    """INT8 codes into the function, which every linear calls; 4-bit codes are clipped before."""
    compiled = toy(bits, "float16", cached=True)
    model = compiled.model
    calls = nodes(model, "QuantizedLinear")
    assert len(calls) == PACKED
    assert {n.domain for n in calls} == {"fptq"}
    quantizers = nodes(model, "QuantizeLinear")
    frozen = compiled.program.call_nodes(ops.fake_quantize)
    for node, quantizer in zip(quantizers, frozen, strict=True):
        _, scale, zero, width, _ = quantizer.args
        assert constant(model, node.input[1]) == np.float16(scale) == scale  # type: ignore[call-overload]
        found = constant(model, node.input[2])
        assert found.dtype == np.int8
        assert found == zero - (1 << (width - 1))  # type: ignore[operator]
    producers = {n.output[0]: n for n in model.graph.node}
    behind_clip = [n for n in quantizers if producers[n.input[0]].op_type == "Clip"]
    assert len(behind_clip) == clipped  # the head's input has 8 bits
    weights = compiled.initializers()
    kinds = Counter(weights[n.input[3]].data_type for n in calls)
    assert kinds == {TYPES.INT4: PACKED - 1, TYPES.INT8: 1}
    assert {producers[n.input[0]].op_type for n in calls} == {"QuantizeLinear"}
    assert not nodes(model, "MatMulNBits")
    assert not nodes(model, "DequantizeLinear")


def test_the_function_is_standard_onnx(toy: CompileForGpu) -> None:
    """Sums of INT32 go to float32: float16 ends at 65,504, and 516 products of INT8 beyond it."""
    (function,) = toy("4-8-8", "float16", cached=True).model.functions
    assert (function.domain, function.name) == ("fptq", "QuantizedLinear")
    assert [n.op_type for n in function.node] == [
        "Cast", "MatMulInteger", "Cast", "Cast", "Mul", "Cast", "Mul", "CastLike"
    ]
    assert {n.domain for n in function.node} == {""}
    casts = {n.input[0]: attributes(n)["to"] for n in function.node if n.op_type == "Cast"}
    (matmul,) = (n for n in function.node if n.op_type == "MatMulInteger")
    assert casts == {
        "weight": TYPES.INT8, "x_scale": TYPES.FLOAT, "weight_scale": TYPES.FLOAT,
        matmul.output[0]: TYPES.FLOAT,
    }


def test_a_scale_a_block_multiplies_behind_codes(toy: CompileForGpu) -> None:
    """No integer kernel takes scales a block: the activation is turned back in front of it."""
    compiled = toy("4-8-8/64", "float16")
    found = nodes(compiled.model, "MatMulNBits")
    assert len(found) == LINEARS - 1
    producers = {n.output[0]: n.op_type for n in compiled.model.graph.node}
    assert {producers[n.input[0]] for n in found} == {"DequantizeLinear"}
    assert {attributes(n)["block_size"] for n in found} == {32}
    assert len(nodes(compiled.model, "QuantizedLinear")) == 1  # the head has a scale a channel


# Float types.


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_no_float32_is_left_but_where_it_must_be(toy: CompileForGpu, dtype: str) -> None:
    compiled = toy("4-16-16", dtype)
    kinds = {t.data_type for t in compiled.initializers().values()}
    # Rotary frequencies, which a cosine is taken of, stay; nothing else does.
    half = getattr(TYPES, dtype.upper())
    wide = [t for t in compiled.initializers().values() if t.data_type == TYPES.FLOAT]
    assert half in kinds
    assert {TYPES.INT8, TYPES.UINT8} < kinds
    assert sum(np.prod(t.dims) for t in wide) <= 8
    (logits,) = compiled.model.graph.output
    expected = TYPES.FLOAT16 if dtype == "float16" else TYPES.FLOAT
    assert logits.type.tensor_type.elem_type == expected


def test_bfloat16_says_what_was_compared(toy: CompileForGpu) -> None:
    compiled = toy("4-16-16", "bfloat16")
    onnx.checker.check_model(compiled.model)
    assert any("compared in float32" in words for words in compiled.report.decisions)
    assert "logits, relative" in compiled.report.parity
    assert not any(key.startswith("float16") for key in compiled.report.parity)


def test_float16_is_compared_twice(toy: CompileForGpu) -> None:
    """In float32 code by code; in float16 with the codes taken over, within its roundings."""
    compiled = toy("4-8-8", "float16", cached=True)
    parity = compiled.report.parity
    assert parity["activation codes wrong"] == parity["float16: activation codes wrong"] == 0
    assert float(parity["logits, relative"]) <= CLOSE
    logits = float(parity["float16: logits, relative"])
    assert 0 < logits <= float(np.finfo(np.float16).eps) * PACKED**0.5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target": "ort-cuda", "dtype": "bfloat16"}, "no QuantizeLinear of bfloat16"),
        ({"target": "ort-cuda", "dtype": "bfloat16", "bits": Bits(4, 16, 8)}, "no QuantizeLinear"),
        (
            {"target": "ort-cuda", "dtype": "bfloat16", "bits": Bits(4, 16, 16),
             "cache": CacheRecipe(enabled=True)},
            "NumPy cannot hold",
        ),
        ({"target": "qdq", "dtype": "float16"}, "target qdq computes in float32"),
        ({"target": "ort-cpu", "dtype": "bfloat16"}, "for half precision use --target ort-cuda"),
    ],
)
def test_what_a_target_cannot_do_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        float_type_of(replace(Recipe(), **changes))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"target": "qdq"}, "float32"),
        ({"target": "ort-cpu", "dtype": "float32"}, "float32"),
        ({"target": "ort-cuda"}, "float16"),
        ({"target": "ort-cuda", "dtype": "float32"}, "float32"),
        (
            {"target": "ort-cuda", "dtype": "bfloat16", "bits": Bits(4, 16, 8),
             "cache": CacheRecipe(enabled=True)},
            "bfloat16",
        ),
        ({"target": "tensorrt"}, "float16"),
    ],
)
def test_auto_is_the_target_s_own(changes: dict[str, Any], expected: str) -> None:
    assert float_type_of(replace(Recipe(), **changes)) == expected


# The comparison of a file in float16.


def half_parity(compiled: Compiled, model: onnx.ModelProto, folder: Path) -> list[str]:
    path = folder / "changed.onnx"
    onnx.save(model, path)
    ids = torch.from_numpy(random_ids(2, 12))
    parity = check_half_parity(compiled.program, path, ids, folder, TARGET.session_config)
    return parity.failures()


def test_another_scale_is_seen_in_float16(toy: CompileForGpu, tmp_path: Path) -> None:
    """A twentieth more: six codes at the end of the range, where roundings explain a half."""
    compiled = toy("4-8-8", "float16", cached=True)
    model = compiled.model
    assert half_parity(compiled, model, tmp_path) == []
    name = nodes(model, "QuantizeLinear")[0].input[1]
    (scale,) = (n for n in model.graph.node if name in n.output)
    value = onnx.numpy_helper.to_array(scale.attribute[0].t) * np.float16(1.05)
    scale.attribute[0].t.CopyFrom(onnx.numpy_helper.from_array(value))
    assert any("differ away from any tie" in words for words in half_parity(
        compiled, model, tmp_path
    ))


def test_another_weight_code_is_seen_in_blocks(toy: CompileForGpu, tmp_path: Path) -> None:
    compiled = toy("4-16-16", "float16")
    model = compiled.model
    assert half_parity(compiled, model, tmp_path) == []
    packed = next(t for t in model.graph.initializer if t.name.endswith("weight_codes_blocks"))
    codes = onnx.numpy_helper.to_array(packed).copy()
    codes[1, 0, 3] ^= 0x10
    packed.CopyFrom(onnx.numpy_helper.from_array(codes, packed.name))
    found = half_parity(compiled, model, tmp_path)
    assert found[0] == "the weight codes in the file are not the program's"


# The contract.


def broken(compiled: Compiled, model: onnx.ModelProto, folder: Path) -> list[str]:
    path = folder / "changed.onnx"
    onnx.save(model, path)
    optimized = optimized_graph(path, folder, TARGET.session_config)
    written = InlinePass()(ir.load(path)).model
    return broken_promises(compiled.program, written, optimized)


def test_the_written_files_keep_the_contract(toy: CompileForGpu, tmp_path: Path) -> None:
    for compiled in (toy("4-8-8", "float16", cached=True), toy("4-16-16", "float16")):
        assert broken(compiled, compiled.model, tmp_path) == []


def test_sums_in_float16_break_it(toy: CompileForGpu, tmp_path: Path) -> None:
    compiled = toy("4-8-8", "float16", cached=True)
    model = compiled.model
    (function,) = model.functions
    *_, cast = (n for n in function.node if n.op_type == "Cast")
    cast.attribute[0].i = TYPES.FLOAT16
    for node in function.node:  # the other factor too, or the types do not fit
        if node.op_type == "Cast" and node.input[0] in ("x_scale", "weight_scale"):
            node.attribute[0].i = TYPES.FLOAT16
    found = broken(compiled, model, tmp_path)
    assert len(found) == PACKED
    assert all("its sums go to FLOAT16, expected FLOAT" in words for words in found)


def test_a_bias_inside_breaks_it(toy: CompileForGpu, tmp_path: Path) -> None:
    compiled = toy("4-16-16", "float16")
    model = compiled.model
    node = nodes(model, "MatMulNBits")[0]
    width = attributes(node)["N"]
    model.graph.initializer.append(
        onnx.numpy_helper.from_array(np.ones(width, np.float16), "added")
    )
    node.input.extend(["", "", "added"])
    (words,) = broken(compiled, model, tmp_path)
    assert "MatMulNBits with blocks of 32 and 4 inputs, expected 32 and 3" in words


def test_unsigned_codes_break_it(toy: CompileForGpu, tmp_path: Path) -> None:
    compiled = toy("4-8-8", "float16", cached=True)
    model = compiled.model
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "value" and attribute.t.data_type == TYPES.INT8:
                codes = onnx.numpy_helper.to_array(attribute.t).view(np.uint8)
                attribute.t.CopyFrom(onnx.numpy_helper.from_array(codes, attribute.t.name))
    found = broken(compiled, model, tmp_path)
    assert any("QuantizeLinear with codes in UINT8, expected INT8" in words for words in found)
    assert any("MatMulInteger with codes in UINT8, expected INT8" in words for words in found)


# Attention with a cache.


def test_the_fused_kernel_counts_and_hides_by_itself(toy: CompileForGpu) -> None:
    """The CUDA kernel refuses a mask with a quantised cache: it stands in the other branch."""
    model = toy("4-4-4", "float16", cached=True).model
    (node,) = (n for n in model.graph.node if n.op_type == "If")
    given = {a.name: a.g for a in node.attribute}
    (fused,) = (n for n in given["then_branch"].node if n.op_type == "GroupQueryAttention")
    assert len(fused.input) == 14
    assert list(fused.input[9:12]) == ["", "", ""]
    scales = {t.name: t for t in model.graph.initializer if t.name in fused.input[12:]}
    assert [scales[name].data_type for name in fused.input[12:]] == [TYPES.FLOAT, TYPES.FLOAT]
    assert attributes(fused)["kv_cache_bit_width"] == 4
    other = {n.op_type for n in every_node(given["else_branch"])}
    assert "Attention" in other
    assert "GroupQueryAttention" not in other


@pytest.mark.parametrize(
    "bounds", [list(range(11)), [0, 4, 5, 6, 10], [0, 10]], ids=["tokens", "chunks", "whole"]
)
@pytest.mark.parametrize("batch", [1, 2])
def test_decoding_is_the_whole_sequence(toy: CompileForGpu, batch: int, bounds: list[int]) -> None:
    """In float32, where codes are equal; a batch of chunks takes the branch without the kernel."""
    compiled = toy("4-8-8", "float32", cached=True)
    model = load(compiled.path, provider="CPUExecutionProvider", threads=1)
    ids = random_ids(batch, 10)
    expected = compiled.program.run(torch.from_numpy(ids)).numpy()
    assert error(decode(model, ids, bounds)[0], expected) <= CLOSE


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_moves_nothing(toy: CompileForGpu, side: str) -> None:
    """Two prompts of unlike length in one batch, then a token each and a chunk each."""
    model = load(toy("4-8-8", "float32", cached=True).path, provider="cpu", threads=1)
    long, short = random_ids(1, 9), random_ids(1, 7, seed=4)
    ids, mask = np.full((2, 5), 60), np.ones((2, 5), np.int64)
    shown, hidden = (slice(2, 5), slice(0, 2)) if side == "left" else (slice(0, 3), slice(3, 5))
    ids[0], ids[1, shown], mask[1, hidden] = long[0, :5], short[0, :3], 0
    alone = [decode(model, x, [0, x.shape[1]])[0][0] for x in (long, short)]
    logits, cache = model.step(ids, model.start(2), mask)
    assert error(logits[0], alone[0][:5]) <= CLOSE
    assert error(logits[1, shown], alone[1][:3]) <= CLOSE
    follow = np.stack((long[0, 5:], short[0, 3:]))
    for part in (slice(0, 1), slice(1, 4)):
        logits, cache = model.step(follow[:, part], cache)
        assert error(logits[0], alone[0][5:][part]) <= CLOSE
        assert error(logits[1], alone[1][3:][part]) <= CLOSE


@pytest.mark.parametrize(("bits", "kind"), [("4-8-8", "int8"), ("4-4-4", "int4")])
def test_a_float16_file_runs_on_cpu(toy: CompileForGpu, bits: str, kind: str) -> None:
    """The parity check has compared its numbers; here it is opened as a user would."""
    compiled = toy(bits, "float16", cached=True)
    model = load(compiled.path, provider="CPUExecutionProvider", threads=1)
    assert model.cache_type == kind
    ids = random_ids(1, 10)
    logits, _ = decode(model, ids, [0, 6, 7, 10])
    assert (logits.shape, logits.dtype) == ((1, 10, ToyConfig.vocabulary), np.float32)
    assert np.isfinite(logits).all()


def test_the_session_file(toy: CompileForGpu) -> None:
    found = SessionFile.read(toy("4-8-8", "float16", cached=True).path)
    assert (found.target, found.context_length) == ("ort-cuda", CACHE_LENGTH)
    assert found.providers == ("CUDAExecutionProvider", "CPUExecutionProvider")
    assert found.session_config["ep.cuda.fpa_intb_gemm"] == "1"
