"""unpack_heads: packed projections whose heads lie mixed become three ranges."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch.export import ExportedProgram

from fptq_compiler.graph.dump import dump
from fptq_compiler.graph.pipeline import run_passes
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.unlift import unlift
from fptq_compiler.passes import FIND_SITES
from fptq_compiler.passes.unpack_heads import UnpackHeads
from tests.handwritten import HEAD, HEADS, Spelling, export_block
from tests.passes.steps import EXACT, assert_settled, change, decomposed, run

PACKED = Spelling(projection="per_head", rope="none")
BEFORE_IT = FIND_SITES[: [type(p) for p in FIND_SITES].index(UnpackHeads)]
_exported = cache(export_block)


def prepared(exported: ExportedProgram) -> Program:
    program = unlift(exported)
    run_passes(program, BEFORE_IT)
    return program


def lines(program: Program, word: str) -> list[str]:
    return [line for line in dump(program.module).splitlines() if word in line]


def test_text() -> None:
    program = prepared(_exported(PACKED))
    assert lines(program, "view(") == [
        "view = view(linear, [sym_size_int_3, sym_size_int_4, 2, 4, 8])"
    ]
    run(program, UnpackHeads())
    assert lines(program, "slice(linear") == [
        "slice_tensor = slice(linear, 2, 0, 32)",
        "slice_tensor_1 = slice(linear, 2, 32, 48)",
        "slice_tensor_2 = slice(linear, 2, 48, 64)",
    ]
    assert lines(program, "view(") == []


@pytest.mark.parametrize("rope", ["none", "half", "interleaved", "complex", "partial"])
@pytest.mark.parametrize("kv_heads", [1, 2, HEADS])
def test_numbers(rope: str, kv_heads: int) -> None:
    program = prepared(export_block(Spelling("per_head", rope=rope, kv_heads=kv_heads)))
    before = program.parameter("qkv.0").clone()
    if kv_heads == 1:  # one group: its queries, its key and its value are ranges already
        assert run(program, UnpackHeads()).changed == 0
        return
    assert change(program, UnpackHeads()) < EXACT
    after = program.parameter("qkv.0")
    group = HEADS // kv_heads
    queries = before.unflatten(0, (kv_heads, group + 2, HEAD))[:, :group].flatten(0, 2)
    assert torch.equal(after[: HEADS * HEAD], queries)


def test_an_output_projection_that_reads_channels_first() -> None:
    """How an einsum over heads and channels is decomposed: channels outside, heads inside."""
    program = prepared(decomposed(_exported(Spelling(core="einsum"))))
    before = program.parameter("output").clone()
    assert change(program, UnpackHeads()) < EXACT
    expected = before.unflatten(1, (HEAD, HEADS)).transpose(1, 2).flatten(1)
    assert torch.equal(program.parameter("output"), expected)


@pytest.mark.parametrize("broken", ["relu_q", "reads_v"])
def test_near_miss(broken: str) -> None:
    """An activation before the heads are taken apart; a second reader of the packed projection."""
    program = prepared(export_block(Spelling("per_head", rope="none", broken=broken)))
    before = dump(program.module)
    assert run(program, UnpackHeads()).changed == 0
    assert dump(program.module) == before


def test_twice() -> None:
    program = prepared(_exported(PACKED))
    run(program, UnpackHeads())
    assert_settled(program, UnpackHeads())
