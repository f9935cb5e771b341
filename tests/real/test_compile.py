"""The whole way, at every setting: what stands in the file, and that it is what was compiled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import onnx
import pytest
import torch

from fptq_compiler import driver, lower
from fptq_compiler.graph import ops
from fptq_compiler.graph.unlift import unlift
from fptq_compiler.graph.verify import relative_error
from fptq_compiler.lower.parity import check_parity
from fptq_compiler.progress import SilentProgress
from fptq_compiler.recipe import Recipe
from fptq_compiler.runtime.session_file import FULL_PRECISION
from tests.compiling import (
    BIASED,
    SMALL,
    Compiled,
    compile_toy,
    keeping_program,
    quick,
    run_onnx,
)
from tests.toys import ToyConfig, export_toy

SETTINGS = (
    "4-8-8", "4-4-4", "4-16-16", "16-16-16", "8-8-8", "4-16-8", "4-8-16", "16-8-8",
    "4-16-16/32", "4-8-8/32",
)
SHAPES = ((1, 1), (2, 7), (3, 40))  # of token ids, batch and sequence
ORIGINAL = 1e-5  # of the largest logit: 16-16-16 is the original in float32, summed otherwise
Compile = Callable[[str], Compiled]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """Compile the toy at a setting, once in this module; "biased 4-8-8" has every bias."""
    done: dict[str, Compiled] = {}

    def compile_at(name: str) -> Compiled:
        if name not in done:
            config = BIASED if name.startswith("biased") else SMALL
            recipe = quick(name.split()[-1])
            path = tmp_path_factory.mktemp("compiled") / "toy.onnx"
            done[name] = compile_toy(config, recipe, path)
        return done[name]

    return compile_at


@pytest.fixture(scope="module")
def story(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """Compile stories260K at a setting, once in this module, from its folder."""
    done: dict[str, Compiled] = {}

    def compile_at(name: str) -> Compiled:
        if name not in done:
            path = tmp_path_factory.mktemp("compiled") / "stories.onnx"
            done[name] = compile_stories(stories, path, quick(name))
        return done[name]

    return compile_at


def compile_stories(stories: Path, path: Path, recipe: Recipe) -> Compiled:
    options = driver.Options(recipe=recipe)
    return keeping_program(
        lambda: driver.compile_file(stories, path, options, SilentProgress()), path, recipe
    )


def is_packed(tensor: onnx.TensorProto) -> bool:
    """Whether an INT4 tensor stands in half a byte a code."""
    count = 1
    for size in tensor.dims:
        count *= size
    return len(tensor.raw_data) == -(-count // 2)


def check_file(compiled: Compiled, folder: Path) -> None:
    """All that must hold of any written file."""
    check_shapes(compiled, folder)
    check_packing(compiled)
    check_audit(compiled)
    check_metadata(compiled)


def check_shapes(compiled: Compiled, folder: Path) -> None:
    """Batch and sequence are free, and the file is the program at three shapes.

    `check_parity` compares code by code, so that a tie between two codes, which may fall either
    way on another processor, is no failure.
    """
    (ids,) = compiled.model.graph.input
    assert all(size.dim_param for size in ids.type.tensor_type.shape.dim)
    vocabulary = compiled.program.run(torch.zeros(1, 1, dtype=torch.int64)).shape[-1]
    for shape in SHAPES:
        generator = torch.Generator().manual_seed(shape[1])
        tokens = torch.randint(vocabulary, shape, generator=generator)
        assert run_onnx(compiled.path, tokens).shape == (*shape, vocabulary)
        parity = check_parity(
            compiled.program, compiled.path, tokens, folder, FULL_PRECISION
        )
        assert parity.failures() == []


def check_packing(compiled: Compiled) -> None:
    """Every linear of four bits has its codes packed, and there is nothing else of INT4."""
    tensors = compiled.initializers().values()
    narrow = [t for t in tensors if t.data_type == onnx.TensorProto.INT4]
    linears = compiled.program.call_nodes(ops.linear)
    assert len(narrow) == sum(node.args[4] == 4 for node in linears)
    assert all(is_packed(tensor) for tensor in narrow)
    assert (len(narrow) > 0) == (compiled.recipe.bits.weights == 4)


def check_audit(compiled: Compiled) -> None:
    bits = compiled.recipe.bits.weights
    rows = {row.kind: row for row in compiled.report.audit}
    assert all(row.as_requested for row in compiled.report.audit)
    if bits == 16:
        assert not {"linear weights", "embedding", "head"} & set(rows)
    else:
        kinds = ("linear weights", "embedding", "head")
        written = [rows[kind].written for kind in kinds]
        assert written == [f"INT{bits}", "INT8", "INT8"]
        tensors = compiled.initializers().values()
        codes = sum(len(t.raw_data) for t in tensors if t.data_type == onnx.TensorProto.INT4)
        assert bits != 4 or rows["linear weights"].bytes == codes
    parity = compiled.report.parity
    assert parity["weight codes equal"] == "True"
    assert parity["activation codes wrong"] == 0
    assert float(parity["logits, relative"]) <= 1e-4  # the limit; float32 shows 1e-6
    assert compiled.report.size_after == compiled.path.stat().st_size


def check_metadata(compiled: Compiled) -> None:
    found = {entry.key: entry.value for entry in compiled.model.metadata_props}
    assert Recipe.from_toml(found["fptq.recipe"], "metadata") == compiled.recipe
    assert found["fptq.seed"] == "0"
    assert found["fptq.target"] == "qdq"
    assert all(f"{name} " in found["fptq.versions"] for name in ("torch", "onnx", "onnxruntime"))
    assert str(compiled.path.parent).encode() not in compiled.path.read_bytes()
    assert b"site-packages" not in compiled.path.read_bytes()


@pytest.mark.parametrize("setting", [*SETTINGS, "biased 4-8-8", "biased 4-16-8"])
def test_a_toy_at_every_setting(toy: Compile, setting: str, tmp_path: Path) -> None:
    check_file(toy(setting), tmp_path)


@pytest.mark.parametrize(
    "setting", [s if s == "4-8-8" else pytest.param(s, marks=pytest.mark.slow) for s in SETTINGS]
)
def test_stories_at_every_setting(story: Compile, setting: str, tmp_path: Path) -> None:
    compiled = story(setting)
    check_file(compiled, tmp_path)
    folders = {row.name for row in compiled.report.sites}
    assert {"residual", "model.layers.0.self_attn", "model.layers.4.mlp"} <= folders


def check_original(compiled: Compiled, original: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for shape in SHAPES:
        generator = torch.Generator().manual_seed(shape[1])
        tokens = torch.randint(61, shape, generator=generator)
        error = relative_error(run_onnx(compiled.path, tokens), original(tokens))
        assert error <= ORIGINAL


@pytest.mark.parametrize("setting", ["16-16-16", "biased 16-16-16"])
def test_nothing_quantised_is_the_original(toy: Compile, setting: str) -> None:
    config = BIASED if setting.startswith("biased") else SMALL
    compiled = toy(setting)
    assert compiled.report.curves  # the transforms were trained: they are not identities
    check_original(compiled, unlift(export_toy(config)).run)


@pytest.mark.slow
def test_nothing_quantised_is_the_original_in_stories(story: Compile, stories: Path) -> None:
    original, _ = driver.original_logits(stories)
    check_original(story("16-16-16"), original)


def test_weight_only_says_what_the_default_level_of_the_runtime_changes(toy: Compile) -> None:
    found = toy("4-16-16").report.parity
    (level4,) = [value for name, value in found.items() if "accuracy level 4" in name]
    assert 0 < float(level4) < 0.1  # INT8 activations on the fly: about a percent


def test_the_same_seed_gives_the_same_file(toy: Compile, tmp_path: Path) -> None:
    first = toy("4-8-8")
    second = compile_toy(SMALL, quick("4-8-8"), tmp_path / "toy.onnx")
    assert second.initializers() == first.initializers()
    assert second.path.read_bytes() == first.path.read_bytes()


def test_another_seed_gives_another_file(toy: Compile, tmp_path: Path) -> None:
    second = compile_toy(SMALL, quick("4-8-8", seed=1), tmp_path / "toy.onnx")
    assert second.initializers() != toy("4-8-8").initializers()
    assert second.report.seed == 1


def test_large_weights_lie_beside_the_file(
    toy: Compile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = toy("4-8-8")
    monkeypatch.setattr(lower, "save", partial(lower.save, external_above=1000))
    compiled = compile_toy(SMALL, quick("4-8-8"), tmp_path / "toy.onnx")
    data = tmp_path / "toy.onnx.data"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["toy.onnx", "toy.onnx.data", "toy.onnx.session.json"]
    sizes = [path.stat().st_size for path in (compiled.path, data)]
    assert compiled.report.size_after == sum(sizes)
    assert sizes[0] < whole.path.stat().st_size
    inside = whole.initializers()
    outside = compiled.initializers()  # onnx.load reads the data in
    assert {n: t.raw_data for n, t in outside.items()} == {
        n: t.raw_data for n, t in inside.items()
    }
    tokens = torch.arange(12).reshape(2, 6)
    assert torch.equal(run_onnx(compiled.path, tokens), run_onnx(whole.path, tokens))


@pytest.mark.parametrize(
    ("config", "missing"),
    [
        (ToyConfig(layers=1, qk_norm=True), {"prerope"}),
        (ToyConfig(layers=1, rope="none", packed_qkv="split", packed_gate_up="chunk"), set()),
        (ToyConfig(layers=1, activation="relu"), set()),
        (ToyConfig(layers=1, norm="one_plus", attention="eager", dtype=torch.bfloat16), set()),
    ],
    ids=["qk-norm", "no-rope-packed", "relu", "one-plus-eager-bfloat16"],
)
def test_other_spellings_go_the_whole_way(
    config: ToyConfig, missing: set[str], tmp_path: Path
) -> None:
    compiled = compile_toy(config, quick("4-8-8"), tmp_path / "toy.onnx")
    check_file(compiled, tmp_path)
    named = {name for row in compiled.report.sites for name in row.not_applied}
    assert named == missing
