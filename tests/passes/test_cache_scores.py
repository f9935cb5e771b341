"""add_cache: factors, windows and capped scores stay with the attention that they stood in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fptq_compiler.graph import cache_ops
from fptq_compiler.graph.pipeline import run_passes
from fptq_compiler.graph.verify import relative_error
from fptq_compiler.passes import FIND_SITES
from fptq_compiler.passes.place_quantizers import PlaceQuantizers
from tests import toys
from tests.passes.cached_runs import CACHE, CHANNELS, TABLES, attending, decoded, freeze, whole
from tests.passes.steps import EXACT, ONE, edited, run
from tests.toys import ToyConfig


def windowed(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Five tokens, scores capped as in Gemma 2."""
    at = torch.arange(q.shape[-2])
    hidden = (at[None, :] > at[:, None]) | (at[None, :] <= at[:, None] - 5)
    scores = torch.tanh(torch.matmul(q, k.transpose(2, 3)) * self.scale / 3) * 3
    return torch.matmul(scores.masked_fill(hidden, float("-inf")).softmax(-1), v)


@pytest.mark.parametrize("chunk", [1, 4])
def test_a_window_and_soft_capping(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    program = attending(monkeypatch, windowed)
    expected = whole(program)
    run(program, CACHE)
    (core,) = program.call_nodes(cache_ops.cached_attention)
    assert core.args[-2:] == (3.0, 5)
    assert relative_error(decoded(program, chunk=chunk), expected) < TABLES


@pytest.mark.parametrize("rope", ["none", "half"])
def test_a_factor_on_the_queries(monkeypatch: pytest.MonkeyPatch, rope: Any) -> None:
    """It goes into the scale of the scores."""

    def attend(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q * 0.7, k, v, is_causal=True, scale=1.0)

    program = attending(monkeypatch, attend, ToyConfig(layers=1, rope=rope, kv_heads=4))
    expected = whole(program)
    run(program, CACHE)
    assert relative_error(decoded(program), expected) < TABLES


@CHANNELS
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
