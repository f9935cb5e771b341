"""Embedding and head in INT4: what stands in the file, and that no tensor stands there twice."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from fptq_compiler import driver
from fptq_compiler.lower.parity import check_parity
from fptq_compiler.recipe import CacheRecipe
from fptq_compiler.runtime.session_file import FULL_PRECISION
from tests.compiling import Compiled, compile_toy, quick
from tests.toys import ToyConfig, make_tokens, make_toy

CONFIG = ToyConfig(layers=2, hidden=32, mlp=48, head_dim=16)
LENGTH = 48
PROBE = torch.arange(24).reshape(2, 12)
TABLE = "model.embed_tokens.weight_codes"
HEAD = "lm_head.weight_codes"
KIBIBYTE = 1024
Compile = Callable[..., Compiled]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """Compile a toy with a cache at bits of embedding and head, once in this module."""
    done: dict[tuple[str, int, int], Compiled] = {}

    def compile_at(target: str, embedding: int = 4, head: int = 4) -> Compiled:
        key = (target, embedding, head)
        if key not in done:
            recipe = quick(
                "4-8-8", target=target, cache=CacheRecipe(enabled=True, max_length=LENGTH)
            ).override(embedding_bits=embedding, head_bits=head)
            path = tmp_path_factory.mktemp("tables") / "toy.onnx"
            done[key] = compile_toy(CONFIG, recipe, path)
        return done[key]

    return compile_at


@pytest.mark.parametrize("target", ["qdq", "ort-cpu"])
def test_half_a_byte_a_code(toy: Compile, target: str) -> None:
    compiled = toy(target)
    rows = {row.kind: row for row in compiled.report.audit}
    read = 33 if target == "ort-cpu" else 32  # by the head: there the stream carries epsilon
    sizes = {"embedding": 61 * 32 // 2, "head": (61 * read + 1) // 2}
    for kind, size in sizes.items():
        assert (rows[kind].requested, rows[kind].written) == ("INT4", "INT4")
        assert (rows[kind].tensors, rows[kind].bytes) == (1, size)
    assert all(row.as_requested for row in compiled.report.audit)
    found = compiled.initializers()
    assert (found[TABLE].data_type, list(found[TABLE].dims)) == (onnx.TensorProto.UINT8, [61, 16])
    assert (found[HEAD].data_type, list(found[HEAD].dims)) == (onnx.TensorProto.INT4, [read, 61])
    assert len(found[TABLE].raw_data) == sizes["embedding"]
    assert len(found[HEAD].raw_data) == sizes["head"]


def test_the_table_is_read_by_the_form_of_the_target(toy: Compile) -> None:
    def readers(compiled: Compiled) -> list[str]:
        return [n.op_type for n in compiled.model.graph.node if TABLE in n.input]

    assert readers(toy("qdq")) == ["Gather"]
    assert readers(toy("ort-cpu")) == ["GatherBlockQuantized"]


def test_the_head_runs_in_the_integer_kernel(toy: Compile) -> None:
    """Query, key and value are one linear in ort-cpu: five a layer, and the head."""
    kernels = str(toy("ort-cpu").report.parity["kernels"])
    assert "11 MatMulIntegerToFloat" in kernels
    assert "MatMulNBits" not in kernels


@pytest.mark.parametrize("target", ["qdq", "ort-cpu"])
def test_one_code_apart_is_seen(toy: Compile, target: str, tmp_path: Path) -> None:
    compiled = toy(target)
    parity = check_parity(compiled.program, compiled.path, PROBE, tmp_path, FULL_PRECISION)
    assert parity.failures() == []
    assert parity.weight_codes_equal
    model = compiled.model
    tensor = next(t for t in model.graph.initializer if t.name == TABLE)
    codes = onnx.numpy_helper.to_array(tensor).copy()
    codes[5, 7] ^= 1 << 4  # an odd channel's code by one
    tensor.CopyFrom(onnx.numpy_helper.from_array(codes, TABLE))
    onnx.save(model, tmp_path / "changed.onnx")
    parity = check_parity(
        compiled.program, tmp_path / "changed.onnx", PROBE, tmp_path, FULL_PRECISION
    )
    assert not parity.weight_codes_equal
    assert parity.wrong > 0


def test_tables_in_float_are_what_was_asked_for(toy: Compile) -> None:
    compiled = toy("ort-cpu", 16, 16)
    assert all(row.as_requested for row in compiled.report.audit)
    assert not {"embedding", "head"} & {row.kind for row in compiled.report.audit}
    found = compiled.initializers()
    assert found["lm_head.weight"].data_type == onnx.TensorProto.FLOAT
    assert found["model.embed_tokens.weight"].data_type == onnx.TensorProto.FLOAT


def equal_tensors(model: onnx.ModelProto) -> list[list[str]]:
    """Names of initialisers and constants above 1 KB that are equal in type, shape and bytes."""
    graphs, tensors = [model.graph], []
    while graphs:
        graph = graphs.pop()
        tensors += [(t.name, t) for t in graph.initializer]
        for node in graph.node:
            graphs += [a.g for a in node.attribute if a.HasField("g")]
            tensors += [(node.output[0], a.t) for a in node.attribute if a.HasField("t")]
    found: dict[tuple[int, tuple[int, ...], bytes], list[str]] = {}
    for name, tensor in tensors:
        raw = onnx.numpy_helper.to_array(tensor).tobytes()
        if len(raw) > KIBIBYTE:
            key = (tensor.data_type, tuple(tensor.dims), sha256(raw).digest())
            found.setdefault(key, []).append(name)
    return [names for names in found.values() if len(names) > 1]


def test_equal_tensors_are_found() -> None:
    helper, table = onnx.helper, np.arange(512, dtype=np.float32)
    constant = helper.make_node("Constant", [], ["b"], value=onnx.numpy_helper.from_array(table))
    graph = helper.make_graph(
        [constant], "twice", [], [], [onnx.numpy_helper.from_array(table, "a")]
    )
    assert equal_tensors(helper.make_model(graph)) == [["a", "b"]]


@pytest.mark.parametrize(("target", "tables"), [("qdq", 4), ("ort-cpu", 4), ("ort-cpu", 16)])
def test_no_tensor_is_twice(toy: Compile, target: str, tables: int) -> None:
    """Angles are shared by all layers, and so are the factors of the Hadamard."""
    assert equal_tensors(toy(target, tables, tables).model) == []


def test_what_two_layers_have_alike_stands_once(tmp_path: Path) -> None:
    """In float, where equal weights are equal initialisers."""
    toy = make_toy(ToyConfig(layers=2))
    first, second = toy.model.layers
    second.load_state_dict(first.state_dict())
    path = tmp_path / "toy.onnx"
    options = driver.Options(recipe=quick("16-16-16").override(transforms="none"))
    examples = (make_tokens(toy.config, 2, 7),)
    driver.compile_model(toy, path, options=options, example_inputs=examples)
    model = onnx.load(path)
    assert equal_tensors(model) == []
    readers = [n for n in model.graph.node if "model.layers.0.mlp.up_proj.weight" in n.input]
    assert len(readers) == 2
