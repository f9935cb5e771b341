"""add_cache at the edges: what it must follow, and what it must refuse before it starts."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional

from fptq_compiler import driver
from fptq_compiler.errors import UnsupportedModelError
from fptq_compiler.graph.pipeline import run_passes
from fptq_compiler.graph.verify import relative_error
from fptq_compiler.passes import FIND_SITES
from fptq_compiler.passes.add_cache import AddCache
from fptq_compiler.passes.place_quantizers import PlaceQuantizers
from fptq_compiler.recipe_parts import CacheRecipe
from fptq_compiler.runtime.session_file import SessionFile
from tests import toys
from tests.compiling import compile_toy, quick
from tests.passes.steps import EXACT, edited, exported_module, run
from tests.passes.test_add_cache import (
    CACHE,
    NO_ROPE,
    TABLES,
    Learned,
    assert_refused,
    attending,
    decoded,
    freeze,
    whole,
)
from tests.toys import MAX_POSITIONS, Toy, ToyConfig, make_tokens, make_toy

ONE = ToyConfig(layers=1)
CACHED = quick("16-16-16", cache=CacheRecipe(enabled=True))


def rectified(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores behind a relu, which no composite operator has."""
    length = q.shape[-2]
    mask = torch.full((length, length), torch.finfo(q.dtype).min).triu(1)
    scores = torch.relu(torch.matmul(q, k.transpose(2, 3)) * self.scale)
    return torch.matmul(functional.softmax(scores + mask, -1), v)


def test_an_attention_that_was_not_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_refused(attending(monkeypatch, rectified), "attention at ")


def test_one_of_two_that_was_not_recognised() -> None:
    def change(toy: Toy) -> None:
        attention = toy.model.layers[1].self_attn
        attention.attend = types.MethodType(rectified, attention)  # type: ignore[method-assign]

    assert_refused(edited(ToyConfig(), change, *FIND_SITES), "attention at ")


@pytest.mark.parametrize("rope", ["none", "half"])
def test_a_factor_on_the_queries(monkeypatch: pytest.MonkeyPatch, rope: Any) -> None:
    """It goes into the scale of the scores."""

    def attend(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q * 0.7, k, v, is_causal=True, scale=1.0)

    program = attending(monkeypatch, attend, ToyConfig(layers=1, rope=rope, kv_heads=4))
    expected = whole(program)
    run(program, CACHE)
    assert relative_error(decoded(program), expected) < TABLES


@pytest.mark.parametrize("channels", [False, True], ids=["per-tensor", "per-channel"])
def test_a_factor_on_the_keys(monkeypatch: pytest.MonkeyPatch, channels: bool) -> None:
    """It goes into the scale of the scores and out of that of the cache."""

    def attend(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k * 0.7, v, is_causal=True)

    monkeypatch.setattr(toys.Attention, "attend", attend)
    place = PlaceQuantizers(
        weights=16, activations=16, cache=4, block=0, embedding_bits=16, head_bits=16,
        stored_cache=True, channel_scales=channels,
    )
    config = ToyConfig(layers=1, kv_heads=4)
    program = edited(config, lambda _: None, *FIND_SITES, place)
    freeze(program, 0.5)
    expected = whole(program)
    run(program, CACHE)
    assert relative_error(decoded(program), expected) < TABLES


def test_a_factor_on_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the repetition it stops the ungrouping, of keys as of values."""

    def attend(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v * 0.7, is_causal=True)

    monkeypatch.setattr(toys.Attention, "attend", attend)
    program = edited(ONE, lambda _: None)
    expected = whole(program)
    run_passes(program, FIND_SITES)
    assert relative_error(whole(program), expected) < EXACT


def test_values_that_are_wider_than_keys() -> None:
    toy = make_toy(NO_ROPE)

    def forward(self: Any, x: Tensor, tables: object) -> Tensor:
        q, k = (
            t.view(*x.shape[:-1], -1, 8).transpose(1, 2) for t in (self.q_proj(x), self.k_proj(x))
        )
        v = self.v_proj(x).view(*x.shape[:-1], 2, 16).transpose(1, 2)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    for module in toy.modules():
        if isinstance(module, toys.Attention):
            module.forward = types.MethodType(forward, module)  # type: ignore[method-assign]
            module.v_proj = nn.Linear(24, 32, bias=False)
            module.o_proj = nn.Linear(64, 24, bias=False)
    toy.requires_grad_(False)
    program = exported_module(toy, make_tokens(ONE, 2, 7), *FIND_SITES)
    assert_refused(program, "keys and values differ in heads or channels")


class RowOfPositions(Learned):
    """GPT-2's spelling: one row of positions for all of the batch."""

    def forward(self, input_ids: Tensor) -> Tensor:
        decoder = self.toy.model
        positions = torch.arange(input_ids.shape[1]).unsqueeze(0)
        x = decoder.embed_tokens(input_ids) + functional.embedding(positions, self.table)
        for layer in decoder.layers:
            x = layer(x, ())
        return self.toy.lm_head(decoder.norm(x))  # type: ignore[no-any-return]


def test_one_row_of_positions() -> None:
    program = exported_module(RowOfPositions(), make_tokens(ONE, 2, 7), *FIND_SITES)
    expected = whole(program)
    run(program, AddCache(MAX_POSITIONS))
    assert relative_error(decoded(program), expected) < EXACT


def test_a_table_of_positions_that_is_too_short() -> None:
    program = exported_module(Learned(), make_tokens(ONE, 2, 7), *FIND_SITES)
    with pytest.raises(UnsupportedModelError, match="its table has 64 positions") as caught:
        run(program, AddCache(MAX_POSITIONS + 1))
    assert "give --max-length 64" in str(caught.value)


def test_the_length_is_bounded_by_the_export(tmp_path: Path) -> None:
    """Tables of angles as buffers are as long as that, and so is a table of positions."""
    compile_toy(ToyConfig(rope="complex", layers=1), CACHED, tmp_path / "toy.onnx")
    assert SessionFile.read(tmp_path / "toy.onnx").context_length == MAX_POSITIONS


def test_a_longer_cache_than_the_export_allows(tmp_path: Path) -> None:
    sizes = ({0: Dim("batch"), 1: Dim("sequence", max=64)},)
    tokens = (make_tokens(ONE, 2, 7),)
    exported = torch.export.export(Learned(), tokens, dynamic_shapes=sizes, strict=False)
    recipe = quick("16-16-16", cache=CacheRecipe(enabled=True, max_length=65))
    with pytest.raises(UnsupportedModelError, match="exported for at most 64 tokens"):
        driver.compile_model(
            exported, tmp_path / "toy.onnx", options=driver.Options(recipe=recipe)
        )
