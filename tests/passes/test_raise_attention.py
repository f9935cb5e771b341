"""raise_attention: every spelling of the attention core becomes one operator."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fptq_compiler.graph import ops
from fptq_compiler.graph.pipeline import PassResult
from fptq_compiler.passes.canonicalize import Canonicalize
from fptq_compiler.passes.raise_attention import RaiseAttention
from tests.passes.steps import (
    EXACT,
    ONE,
    assert_settled,
    captured,
    change,
    edited,
    pick,
    run,
    span,
)
from tests.toys import Toy, ToyConfig

EAGER = ToyConfig(layers=1, attention="eager")

BEFORE = """
unsqueeze_2 = unsqueeze(add_1, 2)
expand = expand(unsqueeze_2, [sym_size_int_6, 2, 2, sym_size_int_7, 8])
reshape = reshape(expand, [sym_size_int_6, 4, sym_size_int_7, 8])
unsqueeze_3 = unsqueeze(transpose_2, 2)
expand_1 = expand(unsqueeze_3, [sym_size_int_6, 2, 2, sym_size_int_7, 8])
reshape_1 = reshape(expand_1, [sym_size_int_6, 4, sym_size_int_7, 8])
full = full([sym_size_int_7, sym_size_int_7], -3.4028234663852886e+38, dtype=torch.float32, \
device=device(type='cpu'), pin_memory=False)
triu = triu(full, 1)
transpose_3 = transpose.int(reshape, 2, 3)
matmul = matmul(add, transpose_3)
mul_5 = mul(matmul, 0.3535533905932738)
add_2 = add(mul_5, triu)
softmax = softmax.int(add_2, -1, torch.float32)
matmul_1 = matmul(softmax, reshape_1)
"""

AFTER = """
attention_default = fptq.attention(add, add_1, transpose_2, None, True, 0.3535533905932738)
"""


def test_text() -> None:
    program = captured(EAGER, Canonicalize())
    assert span(program, "unsqueeze_2", "matmul_1") == BEFORE
    assert run(program, RaiseAttention()) == PassResult(1)
    assert pick(program, "attention_default") == AFTER


@pytest.mark.parametrize(
    "config",
    [
        EAGER,
        ONE,
        ToyConfig(layers=1, gqa="repeat_interleave"),
        ToyConfig(layers=1, gqa="enable_gqa"),
        ToyConfig(layers=1, attention="eager", kv_heads=4),
    ],
    ids=["eager", "expand", "repeat_interleave", "enable_gqa", "ungrouped"],
)
def test_numbers(config: ToyConfig) -> None:
    program = captured(config, Canonicalize())
    assert change(program, RaiseAttention()) < EXACT
    (core,) = program.call_nodes(ops.attention)
    keys = core.args[1]
    assert isinstance(keys, torch.fx.Node)
    assert keys.meta["val"].shape[1] == config.kv_heads


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def _attending(attend: Attend) -> Callable[[Toy], None]:
    def edit(toy: Toy) -> None:
        toy.model.layers[0].self_attn.attend = attend

    return edit


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return torch.matmul(q, k.transpose(2, 3))


def _future(q: Tensor) -> Tensor:
    return torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)


def _per_head(q: Tensor) -> Tensor:
    return torch.arange(1.0, q.shape[1] + 1)[:, None, None]


@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        (
            lambda q, k, v: torch.matmul(_scores(q, k).softmax(2), v),
            "softmax over axis 2, expected the last",
        ),
        (
            lambda q, k, v: torch.matmul((_scores(q, k) * q.mean()).softmax(-1), v),
            "the scores are scaled by an activation, expected a number",
        ),
        (
            lambda q, k, v: torch.matmul(
                _scores(q, k).masked_fill(_future(q), -1.0).softmax(-1), v
            ),
            "masked scores are set to -1.0, expected minus infinity",
        ),
        (
            lambda q, k, v: torch.matmul(_scores(q, k).relu().softmax(-1), v),
            "between scores and softmax expected aten.add or aten.mul or aten.tanh or "
            "aten.where.self, found aten.relu",
        ),
        (
            lambda q, k, v: torch.matmul(
                _scores(q, k).masked_fill(_scores(q, k) > 3.0, -1e9).softmax(-1), v
            ),
            "masked_fill (aten.masked_fill.Scalar) reads the scores in two ways",
        ),
        (
            lambda q, k, v: torch.matmul((_scores(q, k) * _per_head(q)).softmax(-1), v),
            "the scores are scaled by (4, 1, 1) numbers, expected one",
        ),
        (
            lambda q, k, v: torch.matmul(
                (_scores(q, k) / 5.0).tanh().mul(5.0).mul(2.0).softmax(-1), v
            ),
            "mul_6 scales scores that are capped already",
        ),
    ],
    ids=["axis", "scale", "fill", "relu", "own value", "per head", "behind the cap"],
)
def test_near_miss(attend: Attend, reason: str) -> None:
    result = run(edited(ONE, _attending(attend), Canonicalize()), RaiseAttention())
    assert result.changed == 0
    (miss,) = result.near_misses
    assert (miss.what, miss.reason) == ("attention", reason)
    assert 'toys.py", line' in miss.source


def test_near_miss_tiled_heads_are_no_groups() -> None:
    """k, v repeated as 0 1 0 1 instead of 0 0 1 1: they stay repeated, and right."""

    def edit(toy: Toy) -> None:
        toy.model.layers[0].self_attn.repeat = lambda x: x.repeat(1, 2, 1, 1)

    program = edited(ONE, edit, Canonicalize())
    assert change(program, RaiseAttention()) < EXACT
    (core,) = program.call_nodes(ops.attention)
    assert pick(program, core.name) == (
        "\nattention_default = fptq.attention(add, repeat, repeat_1, None, True, "
        "0.3535533905932738)\n"
    )


def test_a_mask_with_a_window_is_a_flag() -> None:
    """A window of three: at a sequence of two it looks causal."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril().triu(-2)
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)

    program = edited(ONE, _attending(attend), Canonicalize())
    assert change(program, RaiseAttention()) < EXACT
    (core,) = program.call_nodes(ops.attention)
    assert pick(program, core.name) == (
        "\nattention_default = fptq.attention(add, add_1, transpose_2, None, True, "
        "0.35355339059327373, 0.0, 3)\n"
    )


def test_soft_capping_stands_before_the_mask() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.tanh(_scores(q, k) * 0.25 / 3.0) * 3.0
        return torch.matmul(scores.masked_fill(_future(q), float("-inf")).softmax(-1), v)

    program = edited(ONE, _attending(attend), Canonicalize())
    assert change(program, RaiseAttention()) < EXACT
    (core,) = program.call_nodes(ops.attention)
    assert core.args[3:] == (None, True, 0.25, 3.0, 0)


def test_near_miss_a_mask_that_hides_more_than_the_future_stays() -> None:
    """Every third key: neither the future nor a window."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys = torch.arange(q.shape[2])
        seen = (keys[None, :] <= keys[:, None]) & ((keys[:, None] - keys[None, :]) % 3 == 0)
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)

    program = edited(ONE, _attending(attend), Canonicalize())
    assert change(program, RaiseAttention()) < EXACT
    (core,) = program.call_nodes(ops.attention)
    mask, causal = core.args[3:5]
    assert str(mask) == "and_1"
    assert causal is False


def test_twice() -> None:
    assert_settled(captured(EAGER, Canonicalize(), RaiseAttention()), RaiseAttention())
