"""add_cache: every attention reads past keys and values and gives what the next run reads."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from fptq_compiler.graph import cache_ops, evaluate, ops
from fptq_compiler.graph.dump import dump
from fptq_compiler.graph.inputs import input_node
from fptq_compiler.graph.pipeline import Effect
from fptq_compiler.graph.verify import relative_error
from fptq_compiler.passes import FIND_SITES
from fptq_compiler.passes.add_cache import AddCache
from tests.passes.cached_runs import (
    CACHE,
    CHANNELS,
    IDS,
    NO_ROPE,
    TABLES,
    VISIBLE,
    decoded,
    empty,
    frozen,
    step,
    whole,
)
from tests.passes.steps import EXACT, ONE, assert_settled, exported_module, run, span, with_sites
from tests.toys import SPELLINGS, ToyConfig, make_tokens, make_toy, name_spelling

BEFORE = """
slice_1 = slice(transpose, 3, 0, 4)
slice_2 = slice(transpose, 3, 4, 9223372036854775807)
mul_1 = mul(transpose, cos)
neg = neg(slice_2)
cat_1 = cat([neg, slice_1], -1)
mul_2 = mul(cat_1, sin)
add = add(mul_1, mul_2)
slice_3 = slice(transpose_1, 3, 0, 4)
slice_4 = slice(transpose_1, 3, 4, 9223372036854775807)
mul_3 = mul(transpose_1, cos)
neg_1 = neg(slice_4)
cat_2 = cat([neg_1, slice_3], -1)
mul_4 = mul(cat_2, sin)
add_1 = add(mul_3, mul_4)
attention_default = fptq.attention(add, add_1, transpose_2, None, True, 0.3535533905932738)
transpose_3 = transpose.int(attention_default, 1, 2)
flatten = flatten.using_ints(transpose_3, 2)
linear_3 = linear(flatten, %model.layers.0.self_attn.o_proj.weight)
"""

INPUTS = """
input_ids = input
attention_mask = input
past_key_values_0_key = input
past_key_values_0_value = input
positions_default = fptq.positions(attention_mask, input_ids)
embedding = embedding(%model.embed_tokens.weight, input_ids)
"""

AFTER = """
linear_2 = linear(rms_norm_default, %model.layers.0.self_attn.v_proj.weight)
cached_attention_default = fptq.cached_attention(linear, linear_1, linear_2, \
past_key_values_0_key, past_key_values_0_value, attention_mask, positions_default, \
%rotary.0.cos, %rotary.0.sin, False, 4, 2, 0.3535533905932738, 16, None, None)
getitem = getitem(cached_attention_default, 0)
getitem_1 = getitem(cached_attention_default, 1)
getitem_2 = getitem(cached_attention_default, 2)
linear_3 = linear(getitem, %model.layers.0.self_attn.o_proj.weight)
"""


def test_text() -> None:
    program = with_sites(ONE)
    assert span(program, "slice_1", "linear_3") == BEFORE
    assert run(program, CACHE).changed == 1
    assert span(program, "input_ids", "embedding") == INPUTS
    assert span(program, "linear_2", "linear_3") == AFTER
    assert dump(program.module).endswith("\nreturn [linear_7, getitem_1, getitem_2]\n")
    assert program.outputs == ("logits", "present.0.key", "present.0.value")
    found = [(s.name, s.dtype, s.dims) for s in program.inputs[1:]]
    past = torch.float32, ("batch", 2, "past", 8)
    assert found == [
        ("attention_mask", torch.int64, ("batch", "total")),
        ("past_key_values.0.key", *past),
        ("past_key_values.0.value", *past),
    ]
    assert AddCache.effect is Effect.PRESERVES
    assert "cached" in program.facts


def test_what_only_rope_read_is_gone_and_layers_share_one_table() -> None:
    program = with_sites(ToyConfig())
    assert run(program, CACHE).changed == 2
    tables = {n.target for n in program.graph.nodes if str(n.target).startswith("rotary.")}
    assert tables == {"rotary.0.cos", "rotary.0.sin"}
    assert program.parameter("rotary.0.cos").shape == (40, 4)
    assert not {"arange", "cos", "sin", "cat"} & {n.name for n in program.graph.nodes}
    names = [n for n, _ in program.module.named_parameters()]
    assert not [n for n in names if "frequencies" in n]


def test_layers_that_rotate_otherwise_have_tables_of_their_own() -> None:
    """Gemma 3 and ModernBERT turn local and global layers by different angles."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.toy = make_toy(ToyConfig())

        def forward(self, input_ids: Tensor) -> Tensor:
            decoder = self.toy.model
            x = decoder.embed_tokens(input_ids)
            cosine, sine = decoder.rotary_emb(x)
            # The second layer turns by twice the angles.
            tables = (cosine, sine), (2 * cosine * cosine - 1, 2 * sine * cosine)
            for layer, table in zip(decoder.layers, tables, strict=True):
                x = layer(x, table)
            return cast(Tensor, self.toy.lm_head(decoder.norm(x)))

    program = exported_module(Two(), make_tokens(ONE, 2, 7), *FIND_SITES)
    expected = whole(program)
    run(program, CACHE)
    tables = {n.target for n in program.graph.nodes if str(n.target).startswith("rotary.")}
    assert {t for t in tables if str(t).endswith("cos")} == {"rotary.0.cos", "rotary.1.cos"}
    assert relative_error(decoded(program), expected) < TABLES


# Numbers: a decoder that reads one token at a time is the decoder that reads all.


def has_cache(config: ToyConfig) -> bool:
    return not config.position_bias


@pytest.mark.parametrize("config", [c for c in SPELLINGS if has_cache(c)], ids=name_spelling)
def test_numbers(config: ToyConfig) -> None:
    """GQA, MQA and MHA, every RoPE and none, packed and biased: all spellings of the toys."""
    program = with_sites(config)
    expected = whole(program)
    assert run(program, CACHE).changed == 2
    tolerance = EXACT if config.rope == "none" else TABLES
    for chunk in (1, 4, 11):
        assert relative_error(decoded(program, chunk=chunk), expected) < tolerance


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("config", [ONE, NO_ROPE], ids=name_spelling)
def test_padding_moves_nothing(side: str, config: ToyConfig) -> None:
    """Row 0 has 3 hidden tokens in its first chunk; row 1 has none; then both go on alone."""
    program = with_sites(config)
    expected = whole(program)
    run(program, CACHE)
    ids, mask = IDS[:, :8].clone(), torch.ones(2, 8, dtype=torch.int64)
    shown, hidden = (slice(3, 8), slice(0, 3)) if side == "left" else (slice(0, 5), slice(5, 8))
    ids[0, shown], ids[0, hidden], mask[0, hidden] = IDS[0, :5], 60, 0
    logits, *past = step(program, ids, mask, empty(program))
    assert relative_error(logits[0, shown], expected[0, :5]) < TABLES
    assert relative_error(logits[1], expected[1, :8]) < TABLES
    after = torch.stack((IDS[0, 5:8], IDS[1, 8:11]))
    for token in range(3):
        mask = torch.cat((mask, torch.ones(2, 1, dtype=torch.int64)), 1)
        logits, *past = step(program, after[:, token : token + 1], mask, past)
        assert relative_error(logits[0, 0], expected[0, 5 + token]) < TABLES
        assert relative_error(logits[1, 0], expected[1, 8 + token]) < TABLES


def test_a_hidden_token_is_not_read() -> None:
    program = with_sites(ONE)
    run(program, CACHE)
    mask = torch.ones(2, 11, dtype=torch.int64)
    mask[:, 2] = 0
    other = IDS.clone()
    other[:, 2] = (other[:, 2] + 1) % ToyConfig.vocabulary
    (first, *_), (second, *_) = (step(program, x, mask, empty(program)) for x in (IDS, other))
    apart = (first - second).abs().amax((0, 2))
    assert float(apart[2]) > VISIBLE  # its own row is its own
    assert torch.equal(first[:, 3:], second[:, 3:])


# A quantised cache.


@CHANNELS
@pytest.mark.parametrize(("bits", "dtype", "width"), [(8, torch.int8, 8), (4, torch.uint8, 4)])
def test_a_quantised_cache_holds_the_codes_of_the_quantisers(
    bits: int, dtype: torch.dtype, width: int, channels: bool
) -> None:
    """Without RoPE the values that are quantised are the same bits: so are codes and logits."""
    program = frozen(NO_ROPE, bits, channels=channels)
    (core,) = program.call_nodes(ops.attention)
    operands = [input_node(core, place) for place in (1, 2)]
    kept: dict[Node, Tensor] = {}
    with torch.no_grad():
        expected = evaluate.run(
            program.module, [IDS], dtype=torch.float64,
            watch=lambda node, value: kept.update({node: value}) if node in operands else None,
        )[0]
    steps = [program.parameter(str(input_node(x, 1).target)) for x in operands]
    quantised = [kept[x] for x in operands]
    assert run(program, CACHE).changed == 1
    assert not program.call_nodes(cache_ops.stored)
    shape = (1, 2, 1, 8) if channels else (1, 1, 1, 1)
    for kind, scale in zip(("key", "value"), steps, strict=True):
        assert program.parameter(f"cache.0.{kind}_scale").shape == shape
        assert torch.equal(program.parameter(f"cache.0.{kind}_scale"), scale)
    assert [(s.dtype, s.dims[3]) for s in program.inputs[2:]] == [(dtype, width)] * 2
    logits, *present = step(program, IDS, torch.ones(2, 11, dtype=torch.int64), empty(program))
    for stored, scale, values in zip(present, steps, quantised, strict=True):
        assert stored.dtype == dtype
        assert torch.equal(cache_ops.decode(stored, scale, bits, torch.float64), values)
    assert relative_error(logits, expected) < EXACT
    assert relative_error(decoded(program), expected) < EXACT


@CHANNELS
def test_keys_are_quantised_behind_rope(channels: bool) -> None:
    """Their values are 6e-8 off, so that a code may flip at a tie: none does on these tokens."""
    for bits in (8, 4):
        program = frozen(ONE, bits, channels=channels)
        expected = whole(program)
        run(program, CACHE)
        assert relative_error(decoded(program), expected) < TABLES


@pytest.mark.parametrize("bits", [16, 8])
def test_twice(bits: int) -> None:
    program = with_sites(ONE) if bits == 16 else frozen(ONE, bits, channels=True)
    run(program, CACHE)
    inputs, outputs = program.inputs, program.outputs
    assert_settled(program, CACHE)
    assert (program.inputs, program.outputs) == (inputs, outputs)
