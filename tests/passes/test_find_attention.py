"""find_attention: the projections, the head layout and the RoPE of every attention."""

from __future__ import annotations

import pytest

from fptq_compiler.graph.pipeline import Effect
from fptq_compiler.graph.sites import AttentionSite, LinearRef, RopeLayout
from fptq_compiler.passes.canonicalize import Canonicalize
from fptq_compiler.passes.find_attention import FindAttention
from fptq_compiler.passes.fold_constants import FoldConstants
from fptq_compiler.passes.raise_attention import RaiseAttention
from fptq_compiler.passes.raise_norms import RaiseNorms
from tests.passes.steps import ONE, assert_settled, captured, edited, logits, run
from tests.toys import Toy, ToyConfig

READY = (Canonicalize(), FoldConstants(), RaiseNorms(), RaiseAttention())
PATH = "model.layers.0.self_attn"

SITE = AttentionSite(
    name=PATH,
    core="attention_default",
    q=LinearRef("linear", f"{PATH}.q_proj.weight", None, 0, 32, 32),
    k=LinearRef("linear_1", f"{PATH}.k_proj.weight", None, 0, 16, 16),
    v=LinearRef("linear_2", f"{PATH}.v_proj.weight", None, 0, 16, 16),
    o=LinearRef("linear_3", f"{PATH}.o_proj.weight", None, 0, 24, 24),
    heads=4,
    kv_heads=2,
    head_dim=8,
    key_node="add_1",
    value_node="transpose_2",
    rope=RopeLayout(((0, 4), (1, 5), (2, 6), (3, 7)), (), 1.0, "half-split"),
)


def test_site() -> None:
    program = captured(ONE, *READY)
    result = run(program, FindAttention())
    assert program.sites.attention == (SITE,)
    assert result.near_misses == ()


def test_site_in_packed_weights() -> None:
    """Each projection is a range of one weight, and of its bias."""
    program = captured(
        ToyConfig(layers=1, packed_qkv="slice", attention_bias=True), *READY, FindAttention()
    )
    (site,) = program.sites.attention
    weight, bias = f"{PATH}.qkv_proj.weight", f"{PATH}.qkv_proj.bias"
    assert site.q == LinearRef("linear", weight, bias, 0, 32, 64)
    assert site.k == LinearRef("linear", weight, bias, 32, 48, 64)
    assert site.v == LinearRef("linear", weight, bias, 48, 64, 64)


def test_numbers() -> None:
    """An analysis runs nothing and moves nothing."""
    assert FindAttention.effect is Effect.ANALYSES
    program = captured(ONE, *READY)
    before = logits(program)
    run(program, FindAttention())
    assert logits(program).equal(before)


@pytest.mark.parametrize(
    ("config", "transform", "reason"),
    [
        (
            ToyConfig(layers=1, qk_norm=True),
            "prerope",
            "query: a norm stands between the projection and attention (QK-norm)",
        ),
        (
            ToyConfig(layers=1, position_bias=True),
            "prerope",
            "query: something is added that does not come from the projection",
        ),
        (ToyConfig(layers=1, value_readers=2), "value", "v has a second reader, mean"),
    ],
    ids=["qk_norm", "position_bias", "value_readers"],
)
def test_near_miss(config: ToyConfig, transform: str, reason: str) -> None:
    program = captured(config, *READY)
    result = run(program, FindAttention())
    (site,) = program.sites.attention
    assert site.refused == {transform: reason}
    (miss,) = result.near_misses
    assert (miss.what, miss.reason) == (transform, reason)
    assert 'toys.py", line' in miss.source


def test_near_miss_tiled_heads() -> None:
    """Query head j reads key head j modulo 2: no block of T_k or T_v is one KV head's."""

    def edit(toy: Toy) -> None:
        toy.model.layers[0].self_attn.repeat = lambda x: x.repeat(1, 2, 1, 1)

    (site,) = edited(ONE, edit, *READY, FindAttention()).sites.attention
    reason = "the heads are not contiguous blocks of the projection's channels"
    assert site.refused == {"prerope": f"key: {reason}", "value": f"value: {reason}"}


def test_twice() -> None:
    program = captured(ONE, *READY, FindAttention())
    assert_settled(program, FindAttention())
    assert program.sites.attention == (SITE,)
