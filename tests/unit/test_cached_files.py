"""Compiled files with a KV cache, run in ONNX Runtime: decoding is the whole sequence at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from onnx import numpy_helper

from fptq_compiler.errors import RuntimeInputError, UnsupportedModelError
from fptq_compiler.graph import cache_ops, evaluate, ops
from fptq_compiler.recipe import Recipe
from fptq_compiler.runtime.model import Cache
from fptq_compiler.runtime.session import load
from fptq_compiler.runtime.session_file import FULL_PRECISION, SessionFile, session_path
from tests.cached_toy import (
    ALIGNED,
    CHUNKS,
    CLOSE,
    FLOAT,
    LENGTH,
    ONE_BY_ONE,
    PER_CHANNEL,
    QUANTISED,
    TARGETS,
    VISIBLE,
    Compile,
    branches,
    branches_of,
    cache_type,
    with_cache,
)
from tests.compiling import Compiled, compile_toy
from tests.decoding import decode, error, random_ids
from tests.onnx_nodes import every_node
from tests.toys import ToyConfig, make_toy


def stored(cache: Cache) -> list[npt.NDArray[Any]]:
    return [value.numpy() for value in cache.values]


@pytest.mark.parametrize("bounds", [ONE_BY_ONE, CHUNKS], ids=["tokens", "chunks"])
@pytest.mark.parametrize("bits", [FLOAT, *QUANTISED])
@pytest.mark.parametrize("target", TARGETS)
def test_decoding_is_the_whole_sequence(
    cached_toy: Compile, target: str, bits: str, bounds: list[int]
) -> None:
    """A batch of two. Codes that are stored are equal, not near.

    They come from k_proj and v_proj, row by row: integer matmuls are exact, MatMulNBits sums a
    row in the same order whatever the number of rows. Attention before them sums in another
    order for one token, 4e-7 of a logit: that moves a code only from a tie, of which these
    tokens have none. Float caches show the difference itself.
    """
    model = load(cached_toy(target, bits).path, threads=1)
    assert (model.cache_type, model.layers) == (cache_type(bits), 2)
    ids = random_ids(2, 12)
    whole, at_once = model.step(ids, model.start(2))
    found, grown = decode(model, ids, bounds)
    assert error(found, whole) <= CLOSE
    for one, other in zip(stored(grown), stored(at_once), strict=True):
        assert one.shape == (2, 2, 12, 8 if cache_type(bits) == "int4" else 16)
        if bits == FLOAT:
            assert np.abs(one - other).max() <= CLOSE * np.abs(other).max()
        else:
            assert np.array_equal(one, other)
            assert len(np.unique(one)) > 8  # codes, and not all of them one


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_quantised_is_the_original(cached_toy: Compile, target: str) -> None:
    model = load(cached_toy(target, FLOAT).path, threads=1)
    ids = random_ids(2, 12)
    original = make_toy(ALIGNED)(torch.from_numpy(ids)).numpy()
    for bounds in ([0, 12], ONE_BY_ONE, CHUNKS):
        assert error(decode(model, ids, bounds)[0], original) <= CLOSE


@pytest.mark.parametrize("bits", QUANTISED)
@pytest.mark.parametrize("target", TARGETS)
def test_the_file_stores_the_codes_of_the_program(
    cached_toy: Compile, target: str, bits: str
) -> None:
    """The frozen program, run in torch one token at a time, makes the same codes."""
    compiled = cached_toy(target, bits)
    ids = random_ids(1, 6)
    past = compiled.program.arguments(torch.from_numpy(ids))[2:]
    with torch.no_grad():
        for token in range(6):
            inputs = [torch.from_numpy(ids[:, token : token + 1]),
                      torch.ones(1, token + 1, dtype=torch.int64), *past]
            _, *past = evaluate.run(compiled.program.module, inputs)
    _, cache = decode(load(compiled.path, threads=1), ids, list(range(7)))
    for ours, theirs in zip(past, stored(cache), strict=True):
        assert np.array_equal(ours.numpy(), theirs)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("bits", [FLOAT, "4-8-8", "4-4-4", *PER_CHANNEL])
@pytest.mark.parametrize("target", TARGETS)
def test_padding_moves_nothing(cached_toy: Compile, target: str, bits: str, side: str) -> None:
    """Two prompts of unlike length in one batch, then a token each and a chunk each."""
    model = load(cached_toy(target, bits).path, threads=1)
    long, short = random_ids(1, 11), random_ids(1, 8, seed=4)
    ids = np.full((2, 7), 60)
    ids[0], mask = long[0, :7], np.ones((2, 7), np.int64)
    shown, hidden = (slice(3, 7), slice(0, 3)) if side == "left" else (slice(0, 4), slice(4, 7))
    ids[1, shown], mask[1, hidden] = short[0, :4], 0
    alone = [decode(model, x, [0, x.shape[1]])[0] for x in (long, short)]
    logits, cache = model.step(ids, model.start(2), mask)
    assert error(logits[0], alone[0][0, :7]) <= CLOSE
    assert error(logits[1, shown], alone[1][0, :4]) <= CLOSE
    follow = np.stack((long[0, 7:], short[0, 4:]))
    for part in (slice(0, 1), slice(1, 2), slice(2, 4)):
        logits, cache = model.step(follow[:, part], cache)
        assert error(logits[0], alone[0][0, 7:][part]) <= CLOSE
        assert error(logits[1], alone[1][0, 4:][part]) <= CLOSE
    assert cache.mask.sum(1).tolist() == [11, 8]


def test_every_cached_token_is_read(cached_toy: Compile) -> None:
    """The checks above would be empty if the logits did not depend on the cache."""
    model = load(cached_toy("ort-cpu", "4-8-8").path, threads=1)
    ids = random_ids(1, 6)
    expected, _ = decode(model, ids, list(range(7)))
    for token in range(5):
        other = ids.copy()
        other[0, token] = (other[0, token] + 1) % ToyConfig.vocabulary
        found, _ = decode(model, other, list(range(7)))
        assert error(found[:, -1], expected[:, -1]) > VISIBLE


# What stands in the file.


def node_counts(compiled: Compiled) -> dict[str, int]:
    """Kernels of ONNX Runtime's optimised graph, branches included."""
    words = str(compiled.report.parity["kernels"]).split(", ")
    return {name: int(count) for count, name in (word.split() for word in words)}


@pytest.mark.parametrize("bits", [FLOAT, *QUANTISED])
def test_ort_cpu_has_a_fused_kernel_for_one_token(cached_toy: Compile, bits: str) -> None:
    compiled = cached_toy("ort-cpu", bits)
    found = branches(compiled.model)
    assert len(found) == 2
    for one, many in found:
        assert [n.op_type for n in one.node if n.op_type != "Constant"] == ["GroupQueryAttention"]
        assert "GroupQueryAttention" not in {n.op_type for n in every_node(many)}
        ((pieces, whole),) = (
            [[n.op_type for n in graph.node].count("Attention") for graph in pair]
            for pair in branches_of(many)
        )
        assert (pieces, whole) == (4, 1)
    opsets = {o.domain: o.version for o in compiled.model.opset_import}
    assert opsets["com.microsoft"] == 1
    counts = node_counts(compiled)
    assert (counts["If"], counts["GroupQueryAttention"]) == (4, 2)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("bits", QUANTISED)
def test_the_scales_stand_in_the_file(cached_toy: Compile, target: str, bits: str) -> None:
    """One for each of 2 heads of 16 channels, or one; the fused kernel is told which."""
    compiled = cached_toy(target, bits)
    scales = {k: t for k, t in compiled.initializers().items() if k.startswith("cache.")}
    kinds = ("key_scale", "value_scale")
    assert set(scales) == {f"cache.{n}.{kind}" for n in range(2) for kind in kinds}
    for name, tensor in scales.items():
        value = numpy_helper.to_array(tensor)
        assert value.shape == ((1, 2, 1, 16) if bits in PER_CHANNEL else (1, 1, 1, 1))
        assert len(np.unique(value)) > value.size // 2  # two may be equal by chance
        assert np.array_equal(value, compiled.program.parameter(name).numpy())
    for one, _ in branches(compiled.model):
        given = {a.name: a.s for node in one.node for a in node.attribute if a.s}
        expected = b"PER_CHANNEL" if bits in PER_CHANNEL else b"PER_TENSOR"
        assert given["k_quant_type"] == given["v_quant_type"] == expected


@pytest.mark.parametrize("bits", PER_CHANNEL)
def test_scales_per_channel_lose_less(cached_toy: Compile, bits: str) -> None:
    """Signal to noise in dB of the keys and values of each layer, on the calibration tokens."""
    channels, tensor = (cached_toy("qdq", x).report.sqnr for x in (bits, bits.partition(" ")[0]))
    stored = [n for n in channels if n.endswith(("_key", "_value"))]
    assert len(stored) == 4
    for name in stored:
        assert channels[name] > tensor[name]


@pytest.mark.parametrize("bits", [FLOAT, *QUANTISED])
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_of_the_linears(cached_toy: Compile, target: str, bits: str) -> None:
    """Seven linears a layer, or five where query, key and value are one, and the head."""
    counts = node_counts(cached_toy(target, bits))
    linears = {"qdq": 14, "ort-cpu": 10}[target]
    integer = linears + 1 if bits not in (FLOAT, "4-16-8") else 0
    assert counts.get("MatMulIntegerToFloat", 0) == integer
    # INT8, the head's bits, has no fast weight-only kernel.
    assert counts.get("MatMulNBits", 0) == (linears if bits == "4-16-8" else 0)


@pytest.mark.parametrize("bits", [FLOAT, *QUANTISED])
def test_qdq_is_standard_onnx(cached_toy: Compile, bits: str) -> None:
    model = cached_toy("qdq", bits).model
    assert {n.domain for n in every_node(model.graph)} == {""}
    assert [o.domain for o in model.opset_import] == [""]
    assert not branches(model)


@pytest.mark.parametrize("target", TARGETS)
def test_layers_share_masks_and_angles(cached_toy: Compile, target: str) -> None:
    nodes = list(every_node(cached_toy(target, "4-8-8").model.graph))
    counted = [n.op_type for n in nodes]
    assert counted.count("Range") == counted.count("CumSum") == 1
    tables = [n for n in nodes if n.op_type == "Gather" and n.input[0].startswith("rotary.")]
    assert len(tables) in (0, 2)  # none where the operators of the branches read the tables
    assert (len(tables) == 2) or target == "ort-cpu"
    names = [name for n in nodes for name in n.output]
    assert len(names) == len(set(names))


def test_nothing_is_left_of_the_compiler_s_own_domain(cached_toy: Compile) -> None:
    for target in TARGETS:
        model = cached_toy(target, "4-8-8").model
        assert "fptq" not in {n.domain for n in every_node(model.graph)}
        assert "fptq" not in {o.domain for o in model.opset_import}


RUNS = {"one token": 1, "few": 4, "many": 11}


@pytest.mark.parametrize("which", RUNS)
def test_every_branch_is_taken(cached_toy: Compile, which: str, tmp_path: Path) -> None:
    """Attention that is twice as sharp in one branch moves the runs that take it, and no other."""
    compiled = cached_toy("ort-cpu", FLOAT)
    model = compiled.model
    for one, more in branches(model):
        ((many, few),) = branches_of(more)
        changed = 0
        for node in {"one token": one, "few": few, "many": many}[which].node:
            for attribute in node.attribute:
                if attribute.name == "scale":
                    attribute.f *= 2.0
                    changed += 1
        assert changed == (4 if which == "many" else 1)
    path = tmp_path / "changed.onnx"
    onnx.save(model, path)
    right, wrong = load(compiled.path, threads=1), load(path, threads=1)
    ids = random_ids(2, 16)
    _, cache = right.step(ids[:, :5], right.start(2))
    for run, tokens in RUNS.items():
        expected, _ = right.step(ids[:, 5 : 5 + tokens], cache)
        moved = error(wrong.step(ids[:, 5 : 5 + tokens], cache)[0], expected)
        assert moved > VISIBLE if run == which else moved == 0


# What lies beside it, and what is refused.


def test_the_session_file_lies_beside_the_model(cached_toy: Compile) -> None:
    for target in TARGETS:
        path = cached_toy(target, "4-8-8").path
        assert sorted(p.name for p in path.parent.iterdir()) == [
            path.name, session_path(path).name
        ]
        found = SessionFile.read(path)
        assert (found.target, found.context_length) == (target, LENGTH)
        assert found.providers == ("CPUExecutionProvider",)
        assert found.session_config == FULL_PRECISION


@pytest.mark.parametrize("target", TARGETS)
def test_the_cache_ends_with_its_tables(cached_toy: Compile, target: str) -> None:
    """The last position works, one more is refused before ONNX Runtime reads past the table."""
    compiled = cached_toy(target, "4-8-8")
    tables = {k: t.dims[0] for k, t in compiled.initializers().items() if "rotary" in k}
    assert set(tables.values()) == {LENGTH}
    model = load(compiled.path, threads=1)
    ids = random_ids(1, LENGTH)
    whole, _ = model.step(ids, model.start(1))
    found, cache = decode(model, ids, [0, LENGTH - 2, LENGTH - 1, LENGTH])
    assert error(found, whole) <= CLOSE
    with pytest.raises(RuntimeInputError, match=f"model's context of {LENGTH}"):
        model.step([[1]], cache)


def test_inputs_and_outputs(cached_toy: Compile) -> None:
    model = cached_toy("ort-cpu", "4-4-4").model
    names = [f"{n}.{kind}" for n in range(2) for kind in ("key", "value")]
    inputs = ["input_ids", "attention_mask", *(f"past_key_values.{n}" for n in names)]
    assert [v.name for v in model.graph.input] == inputs
    assert [v.name for v in model.graph.output] == ["logits", *(f"present.{n}" for n in names)]
    for value in (*model.graph.input[2:], *model.graph.output[1:]):
        shape = value.type.tensor_type.shape.dim
        assert value.type.tensor_type.elem_type == onnx.TensorProto.UINT8
        assert [size.dim_value for size in shape] == [0, 2, 0, 8]
        assert shape[0].dim_param
        assert shape[2].dim_param


def test_the_recipe_travels_with_its_cache(cached_toy: Compile) -> None:
    compiled = cached_toy("ort-cpu", "4-8-8")
    found = {entry.key: entry.value for entry in compiled.model.metadata_props}
    assert Recipe.from_toml(found["fptq.recipe"], "metadata") == compiled.recipe
    assert found["fptq.target"] == "ort-cpu"


def test_a_model_that_cannot_leaves_no_file(tmp_path: Path) -> None:
    config = ToyConfig(layers=1, position_bias=True)
    with pytest.raises(UnsupportedModelError, match=r"^--kv-cache: .*something is added"):
        compile_toy(config, with_cache("16-16-16", "ort-cpu"), tmp_path / "toy.onnx")
    assert list(tmp_path.iterdir()) == []


def test_no_attention_is_left_without_a_cache(cached_toy: Compile) -> None:
    program = cached_toy("qdq", "4-8-8").program
    assert len(program.call_nodes(cache_ops.cached_attention)) == 2
    assert not program.call_nodes(ops.attention)
