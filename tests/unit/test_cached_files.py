"""Compiled files with a KV cache, run in ONNX Runtime: decoding is the whole sequence at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
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
from fptq_compiler.lower.parity import check_parity
from fptq_compiler.recipe import CacheRecipe, Recipe
from fptq_compiler.runtime.model import Cache
from fptq_compiler.runtime.session import load
from fptq_compiler.runtime.session_file import FULL_PRECISION, SessionFile, session_path
from tests.compiling import Compiled, compile_toy, quick
from tests.decoding import decode, error, random_ids
from tests.onnx_nodes import every_node
from tests.toys import ToyConfig, make_toy, name_spelling

LENGTH = 48
ALIGNED = ToyConfig(layers=2, hidden=32, mlp=48, head_dim=16)
"""Two layers, so that they share masks and angles; heads of 16 channels, for the fused kernel."""
NARROW = replace(ALIGNED, layers=1, head_dim=8)
TARGETS = ("qdq", "ort-cpu")
FLOAT = "16-16-16"
PER_TENSOR = ("4-8-8", "4-4-4", "4-16-8")
PER_CHANNEL = ("4-8-8 per-channel", "4-4-4 per-channel")
QUANTISED = (*PER_TENSOR, *PER_CHANNEL)
TYPES = {"16": "float32", "8": "int8", "4": "int4"}
CLOSE = 1e-4
"""Of the largest logit, as in lower.parity. Sums in another order show 4e-7; a key that is hidden
or turned wrongly shows 1e-2, a code that flips at a tie 1e-3 (none does on these tokens)."""
VISIBLE = 1e-3

Compile = Callable[..., Compiled]


def with_cache(setting: str, target: str) -> Recipe:
    """The recipe of "W-A-KV" or "W-A-KV scales"."""
    bits, _, scales = setting.partition(" ")
    plain = "auto" if bits == FLOAT else "per-tensor"
    cache = CacheRecipe(enabled=True, max_length=LENGTH, scales=scales or plain)
    return quick(bits, target=target, cache=cache)


def cache_type(setting: str) -> str:
    return TYPES[setting.partition(" ")[0].rpartition("-")[2]]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """Compile a toy with a cache, once in this module."""
    done: dict[Any, Compiled] = {}

    def compile_at(target: str, bits: str, config: ToyConfig = ALIGNED) -> Compiled:
        key = (target, bits, config)
        if key not in done:
            path = tmp_path_factory.mktemp("cached") / "toy.onnx"
            done[key] = compile_toy(config, with_cache(bits, target), path)
        return done[key]

    return compile_at


def stored(cache: Cache) -> list[npt.NDArray[Any]]:
    return [value.numpy() for value in cache.values]


ONE_BY_ONE = list(range(13))
CHUNKS = [0, 5, 6, 7, 12]


@pytest.mark.parametrize("bounds", [ONE_BY_ONE, CHUNKS], ids=["tokens", "chunks"])
@pytest.mark.parametrize("bits", [FLOAT, *QUANTISED])
@pytest.mark.parametrize("target", TARGETS)
def test_decoding_is_the_whole_sequence(
    toy: Compile, target: str, bits: str, bounds: list[int]
) -> None:
    """A batch of two. Codes that are stored are equal, not near.

    They come from k_proj and v_proj, row by row: integer matmuls are exact, MatMulNBits sums a
    row in the same order whatever the number of rows. Attention before them sums in another
    order for one token, 4e-7 of a logit: that moves a code only from a tie, of which these
    tokens have none. Float caches show the difference itself.
    """
    model = load(toy(target, bits).path, threads=1)
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
def test_nothing_quantised_is_the_original(toy: Compile, target: str) -> None:
    model = load(toy(target, FLOAT).path, threads=1)
    ids = random_ids(2, 12)
    original = make_toy(ALIGNED)(torch.from_numpy(ids)).numpy()
    for bounds in ([0, 12], ONE_BY_ONE, CHUNKS):
        assert error(decode(model, ids, bounds)[0], original) <= CLOSE


@pytest.mark.parametrize("bits", QUANTISED)
@pytest.mark.parametrize("target", TARGETS)
def test_the_file_stores_the_codes_of_the_program(toy: Compile, target: str, bits: str) -> None:
    """The frozen program, run in torch one token at a time, makes the same codes."""
    compiled = toy(target, bits)
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
def test_padding_moves_nothing(toy: Compile, target: str, bits: str, side: str) -> None:
    """Two prompts of unlike length in one batch, then a token each and a chunk each."""
    model = load(toy(target, bits).path, threads=1)
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


def test_every_cached_token_is_read(toy: Compile) -> None:
    """The checks above would be empty if the logits did not depend on the cache."""
    model = load(toy("ort-cpu", "4-8-8").path, threads=1)
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


def branches(model: onnx.ModelProto) -> list[tuple[onnx.GraphProto, onnx.GraphProto]]:
    """then and else of each If of the model itself."""
    return branches_of(model.graph)


def branches_of(graph: onnx.GraphProto) -> list[tuple[onnx.GraphProto, onnx.GraphProto]]:
    found = []
    for node in graph.node:
        if node.op_type == "If":
            given = {a.name: a.g for a in node.attribute}
            found.append((given["then_branch"], given["else_branch"]))
    return found


@pytest.mark.parametrize("bits", [FLOAT, *QUANTISED])
def test_ort_cpu_has_a_fused_kernel_for_one_token(toy: Compile, bits: str) -> None:
    compiled = toy("ort-cpu", bits)
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
def test_the_scales_stand_in_the_file(toy: Compile, target: str, bits: str) -> None:
    """One for each of 2 heads of 16 channels, or one; the fused kernel is told which."""
    compiled = toy(target, bits)
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
def test_scales_per_channel_lose_less(toy: Compile, bits: str) -> None:
    """Signal to noise in dB of the keys and values of each layer, on the calibration tokens."""
    channels, tensor = (toy("qdq", x).report.sqnr for x in (bits, bits.partition(" ")[0]))
    stored = [n for n in channels if n.endswith(("_key", "_value"))]
    assert len(stored) == 4
    for name in stored:
        assert channels[name] > tensor[name]


@pytest.mark.parametrize("bits", [FLOAT, *QUANTISED])
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_of_the_linears(toy: Compile, target: str, bits: str) -> None:
    """Seven linears a layer, or five where query, key and value are one, and the head."""
    counts = node_counts(toy(target, bits))
    linears = {"qdq": 14, "ort-cpu": 10}[target]
    integer = linears + 1 if bits not in (FLOAT, "4-16-8") else 0
    assert counts.get("MatMulIntegerToFloat", 0) == integer
    # INT8, the head's bits, has no fast weight-only kernel.
    assert counts.get("MatMulNBits", 0) == (linears if bits == "4-16-8" else 0)


@pytest.mark.parametrize("bits", [FLOAT, *QUANTISED])
def test_qdq_is_standard_onnx(toy: Compile, bits: str) -> None:
    model = toy("qdq", bits).model
    assert {n.domain for n in every_node(model.graph)} == {""}
    assert [o.domain for o in model.opset_import] == [""]
    assert not branches(model)


@pytest.mark.parametrize("target", TARGETS)
def test_layers_share_masks_and_angles(toy: Compile, target: str) -> None:
    nodes = list(every_node(toy(target, "4-8-8").model.graph))
    counted = [n.op_type for n in nodes]
    assert counted.count("Range") == counted.count("CumSum") == 1
    tables = [n for n in nodes if n.op_type == "Gather" and n.input[0].startswith("rotary.")]
    assert len(tables) in (0, 2)  # none where the operators of the branches read the tables
    assert (len(tables) == 2) or target == "ort-cpu"
    names = [name for n in nodes for name in n.output]
    assert len(names) == len(set(names))


def test_nothing_is_left_of_the_compiler_s_own_domain(toy: Compile) -> None:
    for target in TARGETS:
        model = toy(target, "4-8-8").model
        assert "fptq" not in {n.domain for n in every_node(model.graph)}
        assert "fptq" not in {o.domain for o in model.opset_import}


RUNS = {"one token": 1, "few": 4, "many": 11}


@pytest.mark.parametrize("which", RUNS)
def test_every_branch_is_taken(toy: Compile, which: str, tmp_path: Path) -> None:
    """Attention that is twice as sharp in one branch moves the runs that take it, and no other."""
    compiled = toy("ort-cpu", FLOAT)
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


FORMS = {
    "rotated 8": (NARROW, False),
    "rotated 8 of 16": (replace(ALIGNED, layers=1, rope="partial"), False),
    "rotated 16 of 32": (replace(ALIGNED, layers=1, rope="partial", head_dim=32), True),
    "interleaved": (replace(ALIGNED, layers=1, rope="interleaved"), True),
    "complex": (replace(ALIGNED, layers=1, rope="complex"), True),
    "no rope": (replace(ALIGNED, layers=1, rope="none"), True),
    "one key head": (replace(ALIGNED, layers=1, kv_heads=1), True),
    "no groups, biases": (
        replace(ALIGNED, layers=1, kv_heads=4, attention_bias=True, output_bias=True), True
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_other_heads_on_ort_cpu(toy: Compile, name: str) -> None:
    """The fused kernel takes head sizes and rotated widths that are multiples of 16."""
    config, fused = FORMS[name]
    compiled = toy("ort-cpu", FLOAT, config)
    assert (len(branches(compiled.model)) == 1) == fused
    kernels = {n.op_type for n in every_node(compiled.model.graph)}
    assert ("GroupQueryAttention" in kernels) == fused
    ids = random_ids(2, 12)
    original = make_toy(config)(torch.from_numpy(ids)).numpy()
    model = load(compiled.path, threads=1)
    for bounds in ([0, 12], ONE_BY_ONE, CHUNKS):
        assert error(decode(model, ids, bounds)[0], original) <= CLOSE


@pytest.mark.parametrize("bits", ["4-8-8", "4-4-4", *PER_CHANNEL])
def test_a_narrow_head_falls_back_with_a_quantised_cache(toy: Compile, bits: str) -> None:
    compiled = toy("ort-cpu", bits, NARROW)
    assert not branches(compiled.model)
    model = load(compiled.path, threads=1)
    ids = random_ids(2, 12)
    whole, _ = model.step(ids, model.start(2))
    assert error(decode(model, ids, ONE_BY_ONE)[0], whole) <= CLOSE


# What lies beside it, and what is refused.


def test_the_session_file_lies_beside_the_model(toy: Compile) -> None:
    for target in TARGETS:
        path = toy(target, "4-8-8").path
        assert sorted(p.name for p in path.parent.iterdir()) == [
            path.name, session_path(path).name
        ]
        found = SessionFile.read(path)
        assert (found.target, found.context_length) == (target, LENGTH)
        assert found.providers == ("CPUExecutionProvider",)
        assert found.session_config == FULL_PRECISION


@pytest.mark.parametrize("target", TARGETS)
def test_the_cache_ends_with_its_tables(toy: Compile, target: str) -> None:
    """The last position works, one more is refused before ONNX Runtime reads past the table."""
    compiled = toy(target, "4-8-8")
    tables = {k: t.dims[0] for k, t in compiled.initializers().items() if "rotary" in k}
    assert set(tables.values()) == {LENGTH}
    model = load(compiled.path, threads=1)
    ids = random_ids(1, LENGTH)
    whole, _ = model.step(ids, model.start(1))
    found, cache = decode(model, ids, [0, LENGTH - 2, LENGTH - 1, LENGTH])
    assert error(found, whole) <= CLOSE
    with pytest.raises(RuntimeInputError, match=f"model's context of {LENGTH}"):
        model.step([[1]], cache)


def test_inputs_and_outputs(toy: Compile) -> None:
    model = toy("ort-cpu", "4-4-4").model
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


def test_the_recipe_travels_with_its_cache(toy: Compile) -> None:
    compiled = toy("ort-cpu", "4-8-8")
    found = {entry.key: entry.value for entry in compiled.model.metadata_props}
    assert Recipe.from_toml(found["fptq.recipe"], "metadata") == compiled.recipe
    assert found["fptq.target"] == "ort-cpu"


def test_a_model_that_cannot_leaves_no_file(tmp_path: Path) -> None:
    config = ToyConfig(layers=1, position_bias=True)
    with pytest.raises(UnsupportedModelError, match=r"^--kv-cache: .*something is added"):
        compile_toy(config, with_cache("16-16-16", "ort-cpu"), tmp_path / "toy.onnx")
    assert list(tmp_path.iterdir()) == []


# The comparison with ONNX Runtime covers the cache.

PROBE = torch.arange(24).reshape(2, 12)


@pytest.mark.parametrize("bits", ["4-16-8", "4-16-4 per-channel"])
@pytest.mark.parametrize("target", TARGETS)
def test_parity_compares_what_is_stored(
    toy: Compile, target: str, bits: str, tmp_path: Path
) -> None:
    compiled = toy(target, bits)
    config = SessionFile.read(compiled.path).session_config
    parity = check_parity(compiled.program, compiled.path, PROBE, tmp_path, config)
    assert parity.failures() == []
    # Nothing else is quantised: keys and values of 2 heads of 16 channels in 2 layers.
    assert parity.codes == PROBE.numel() * 2 * 2 * 2 * 16
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bits", ["4-16-8", "4-16-4 per-channel"])
@pytest.mark.parametrize("which", [0, 1], ids=["one", "many"])
def test_parity_sees_another_scale_in_one_branch(
    toy: Compile, which: int, bits: str, tmp_path: Path
) -> None:
    """A tenth more: codes away from zero move by more than a tie."""
    compiled = toy("ort-cpu", bits)
    model = compiled.model
    right = compiled.initializers()["cache.0.key_scale"]
    wrong = np.float32(1.1) * numpy_helper.to_array(right)
    model.graph.initializer.append(numpy_helper.from_array(wrong, "wrong"))
    changed = 0
    for node in branches(model)[0][which].node:
        for place, name in enumerate(node.input):
            if name == right.name:
                node.input[place] = "wrong"
                changed += 1
    assert changed >= 1
    path = tmp_path / "changed.onnx"
    onnx.save(model, path)
    parity = check_parity(compiled.program, path, PROBE, tmp_path, FULL_PRECISION)
    assert parity.wrong > 10
    assert any("differ away from any tie" in words for words in parity.failures())


def test_no_attention_is_left_without_a_cache(toy: Compile) -> None:
    program = toy("qdq", "4-8-8").program
    assert len(program.call_nodes(cache_ops.cached_attention)) == 2
    assert not program.call_nodes(ops.attention)


def test_forms_have_names_of_their_own() -> None:
    assert len({name_spelling(config) for config, _ in FORMS.values()}) == len(FORMS)
