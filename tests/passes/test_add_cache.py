"""add_cache: every attention reads past keys and values and gives what the next run reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import Node
from torch.nn import functional

from fptq_compiler.errors import UnsupportedModelError, VerificationError
from fptq_compiler.graph import cache_ops, evaluate, ops, rotary
from fptq_compiler.graph.dump import dump
from fptq_compiler.graph.pipeline import Effect, Pass, run_passes
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.rotary import Rotary
from fptq_compiler.graph.unlift import unlift
from fptq_compiler.graph.verify import relative_error
from fptq_compiler.passes import FIND_SITES, add_cache
from fptq_compiler.passes.add_cache import AddCache
from fptq_compiler.passes.freeze_quantizers import FreezeQuantizers
from fptq_compiler.passes.place_quantizers import PlaceQuantizers
from fptq_compiler.passes.protect_first_position import ProtectFirstPosition
from tests import toys
from tests.passes.steps import (
    EXACT,
    ONE,
    assert_settled,
    edited,
    exported_module,
    run,
    span,
    with_sites,
)
from tests.toys import MAX_POSITIONS, SPELLINGS, ToyConfig, make_tokens, make_toy, name_spelling

CACHE = AddCache(40)
TABLES = 1e-6
"""Relative, on float64 logits: the tables of angles are float32, 6e-8 off; it shows as 4e-8 at
most, and a wrong rewrite as 1e-2 and more."""
VISIBLE = 1e-2
"""Relative: the least that leaving out one of the things tested here moves the logits."""
NO_ROPE = ToyConfig(layers=1, rope="none")
BIASED = ToyConfig(layers=1, attention_bias=True, output_bias=True, mlp_bias=True)

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
            return self.toy.lm_head(decoder.norm(x))  # type: ignore[no-any-return]

    program = exported_module(Two(), make_tokens(ONE, 2, 7), *FIND_SITES)
    expected = whole(program)
    run(program, CACHE)
    tables = {n.target for n in program.graph.nodes if str(n.target).startswith("rotary.")}
    assert {t for t in tables if str(t).endswith("cos")} == {"rotary.0.cos", "rotary.1.cos"}
    assert relative_error(decoded(program), expected) < TABLES


# Numbers: a decoder that reads one token at a time is the decoder that reads all.

IDS = torch.randint(ToyConfig.vocabulary, (2, 11), generator=torch.Generator().manual_seed(5))


def whole(program: Program, ids: Tensor = IDS) -> Tensor:
    """Float64 logits of the graph without a cache."""
    with torch.no_grad():
        return evaluate.logits(program.module, [ids], torch.float64)


def empty(program: Program, batch: int = 2) -> list[Tensor]:
    """Past keys and values of no tokens."""
    return [
        torch.zeros((batch, s.dims[1], 0, s.dims[3]), dtype=s.dtype)  # type: ignore[arg-type]
        for s in program.inputs[2:]
    ]


def step(program: Program, ids: Tensor, mask: Tensor, past: list[Tensor]) -> list[Tensor]:
    """Float64 logits, and present keys and values."""
    with torch.no_grad():
        return list(evaluate.run(program.module, [ids, mask, *past], dtype=torch.float64))


def decoded(program: Program, ids: Tensor = IDS, chunk: int = 1) -> Tensor:
    """Float64 logits from an empty cache, some tokens at a time."""
    past, found = empty(program, ids.shape[0]), []
    for start in range(0, ids.shape[1], chunk):
        part = ids[:, start : start + chunk]
        mask = torch.ones(ids.shape[0], start + part.shape[1], dtype=torch.int64)
        logits, *past = step(program, part, mask, past)
        found.append(logits)
    return torch.cat(found, 1)


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


def frozen(
    config: ToyConfig, bits: int, *steps: Pass, symmetric: bool = True, channels: bool = False
) -> Program:
    """The toy with keys and values quantised, frozen in steps around an eighth or a half."""
    place = PlaceQuantizers(
        weights=16, activations=16, cache=bits, block=0, embedding_bits=16, head_bits=16,
        stored_cache=symmetric, channel_scales=channels,
    )
    program = with_sites(config, place, *steps)
    freeze(program, 0.5 if bits == 4 else 0.125)
    return program


def freeze(program: Program, scale: float) -> None:
    for record in program.activation_quantizers:
        module: Any = program.module.get_submodule(record.module)
        # A scale of its own for each, so that exchanging two of them shows.
        size = torch.tensor(scale * 1.25 if record.role == "value" else scale)
        if module.scale.dim():
            size = size * torch.linspace(0.5, 1.5, module.scale.numel()).view_as(module.scale)
        module.set_range(size, module.zero_point)
    program.facts |= {"calibrated", "folded"}
    run_passes(program, (FreezeQuantizers(),))


CHANNELS = pytest.mark.parametrize("channels", [False, True], ids=["per-tensor", "per-channel"])


@CHANNELS
@pytest.mark.parametrize(("bits", "dtype", "width"), [(8, torch.int8, 8), (4, torch.uint8, 4)])
def test_a_quantised_cache_holds_the_codes_of_the_quantisers(
    bits: int, dtype: torch.dtype, width: int, channels: bool
) -> None:
    """Without RoPE the values that are quantised are the same bits: so are codes and logits."""
    program = frozen(NO_ROPE, bits, channels=channels)
    cores = program.call_nodes(ops.attention)
    kept: dict[Node, Tensor] = {}
    with torch.no_grad():
        watch = {x for core in cores for x in core.args[1:3]}
        expected = evaluate.run(
            program.module, [IDS], dtype=torch.float64,
            watch=lambda node, value: kept.update({node: value}) if node in watch else None,
        )[0]
    names = [str(x.args[1]) for x in cores[0].args[1:3]]  # type: ignore[union-attr]
    steps = [program.parameter(str(program.node(n).target)) for n in names]
    quantised = [kept[x] for x in cores[0].args[1:3]]  # type: ignore[index]
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


def test_an_asymmetric_quantiser_is_refused() -> None:
    program = frozen(ONE, 8, symmetric=False)
    words = r"at \w+_key_frozen cannot be .*its grid has a zero-point, 0, expected a symmetric one"
    assert_refused(program, words)


# Near misses: each is refused by name before anything is changed.


def assert_refused(program: Program, words: str) -> None:
    before = dump(program.module)
    with pytest.raises(UnsupportedModelError, match=words) as caught:
        run(program, CACHE)
    assert str(caught.value).startswith("--kv-cache: attention at ")
    assert str(caught.value).endswith("Compile without --kv-cache.")
    assert dump(program.module) == before
    assert "cached" not in program.facts


Attend = Callable[[Any, Tensor, Tensor, Tensor], Tensor]


def attending(monkeypatch: pytest.MonkeyPatch, attend: Attend, config: ToyConfig = ONE
              ) -> Program:
    """The toy with another attention core."""
    monkeypatch.setattr(toys.Attention, "attend", attend)
    return edited(config, lambda _: None, *FIND_SITES)


def strided(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every other token of the past."""
    at = torch.arange(q.shape[-2])
    shown = (at[None, :] <= at[:, None]) & ((at[:, None] - at[None, :]) % 2 == 0)
    return functional.scaled_dot_product_attention(q, k, v, shown, scale=self.scale)


def windowed(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Five tokens, scores capped as in Gemma 2."""
    at = torch.arange(q.shape[-2])
    hidden = (at[None, :] > at[:, None]) | (at[None, :] <= at[:, None] - 5)
    scores = torch.tanh(torch.matmul(q, k.transpose(2, 3)) * self.scale / 3) * 3
    return torch.matmul(scores.masked_fill(hidden, float("-inf")).softmax(-1), v)


def everywhere(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, scale=self.scale)


@pytest.mark.parametrize("attend", [strided, everywhere])
def test_a_mask_that_is_not_causal(monkeypatch: pytest.MonkeyPatch, attend: Attend) -> None:
    program = attending(monkeypatch, attend)
    line = r"\(File .*toys\.py"
    assert_refused(program, rf"attention_default .*mask is not the plain causal one {line}")


class Further(nn.Module):
    """A toy with a second input: a mask, or positions."""

    def __init__(self, second: str) -> None:
        super().__init__()
        self.toy, self.second = make_toy(ONE), second

    def forward(self, input_ids: Tensor, further: Tensor) -> Tensor:
        decoder = self.toy.model
        x = decoder.embed_tokens(input_ids)
        tables = decoder.rotary_emb(x)
        if self.second == "mask":
            attention: Any = decoder.layers[0].self_attn

            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                shown = further[:, None, None, :] != 0
                shown = shown & torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
                return functional.scaled_dot_product_attention(q, k, v, shown)

            attention.attend = attend
        else:
            angles = further[:, None, :, None].float() * decoder.rotary_emb.frequencies
            angles = torch.cat((angles, angles), -1)
            tables = (angles.cos(), angles.sin())
        for layer in decoder.layers:
            x = layer(x, tables)
        return self.toy.lm_head(decoder.norm(x))  # type: ignore[no-any-return]


def with_second_input(second: str) -> Program:
    ids = make_tokens(ONE, 2, 7)
    sizes = {0: Dim("batch"), 1: Dim("sequence", max=MAX_POSITIONS)}
    further = torch.arange(7).expand(2, 7).contiguous() if second == "positions" else ids * 0 + 1
    exported = torch.export.export(
        Further(second), (ids, further), dynamic_shapes=(sizes, sizes), strict=False
    )
    program = unlift(exported)
    run_passes(program, FIND_SITES)
    return program


def test_a_mask_as_an_input() -> None:
    assert_refused(with_second_input("mask"), "its mask is not the plain causal one")


def test_positions_as_an_input() -> None:
    words = "at further cannot .*the model has further inputs; export it with token ids only"
    assert_refused(with_second_input("positions"), words)


def test_angles_that_depend_on_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamic NTK: every key would turn when one more token comes."""

    def stretched(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        length = x.shape[1]
        positions = torch.arange(length)[:, None].float()
        angles = positions * self.frequencies / (1 + length / 16)
        angles = torch.cat((angles, angles), -1)
        return angles.cos(), angles.sin()

    monkeypatch.setattr(toys.Rotary, "forward", stretched)
    program = edited(ONE, lambda _: None, *FIND_SITES)
    assert_refused(program, "the angles change with the length of the sequence, which keys that")


def test_pairs_that_are_neither_halves_nor_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Channel i turns with channel D - 1 - i: a rotation that T_k takes and no runtime has."""

    def mirrored(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        back = x.flip(-1)
        cosine = torch.cat((cosine[..., :half], cosine[..., :half].flip(-1)), -1)
        sine = torch.cat((sine[..., :half], sine[..., :half].flip(-1)), -1)
        return x * cosine + torch.cat((-back[..., :half], back[..., half:]), -1) * sine

    monkeypatch.setattr(toys, "rotate_halves", mirrored)
    program = edited(ONE, lambda _: None, *FIND_SITES)
    pairs = r"\(\(0, 7\), \(1, 6\), \(2, 5\)\)… are neither halves nor neighbours"
    assert_refused(program, pairs)


@pytest.mark.parametrize("angle", [0.0, 2.0])
def test_keys_that_turn_otherwise_than_queries(
    monkeypatch: pytest.MonkeyPatch, angle: float
) -> None:
    plain = toys.rotate

    def rotate(x: Tensor, tables: tuple[Tensor, ...], config: ToyConfig) -> Tensor:
        if x.shape[1] == config.heads:
            return plain(x, tables, config)
        cosine, sine = tables
        if angle == 0.0:
            return x
        return plain(x, (2 * cosine * cosine - 1, 2 * sine * cosine), config)

    monkeypatch.setattr(toys, "rotate", rotate)
    program = edited(ONE, lambda _: None, *FIND_SITES)
    assert_refused(program, "attention_default .*queries and keys are not rotated alike")


def test_values_that_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        at = torch.arange(q.shape[-2])[:, None].float() * torch.ones(8)
        v = toys.rotate_halves(v, at.cos(), at.sin())
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)

    program = attending(monkeypatch, attend, ToyConfig(layers=1, kv_heads=4))
    assert_refused(program, "the values are rotated")


def test_queries_that_are_no_rotation_of_the_projection() -> None:
    program = with_sites(ToyConfig(layers=1, position_bias=True))
    assert_refused(program, "something is added that does not come from")


@pytest.mark.parametrize("chunk", [1, 4])
def test_a_window_and_soft_capping(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    program = attending(monkeypatch, windowed)
    expected = whole(program)
    run(program, CACHE)
    (core,) = program.call_nodes(cache_ops.cached_attention)
    assert core.args[-2:] == (3.0, 5)
    assert relative_error(decoded(program, chunk=chunk), expected) < TABLES


def test_one_layer_that_cannot_refuses_the_model() -> None:
    def edit(toy: toys.Toy) -> None:
        attention: Any = toy.model.layers[1].self_attn
        attention.attend = lambda q, k, v: everywhere(attention, q, k, v)

    program = edited(ToyConfig(), edit, *FIND_SITES)
    assert_refused(program, "attention_default_1 .*its mask is not the plain causal one")


# What follows positions besides RoPE.

FIRST = """
positions_default = fptq.positions(attention_mask, input_ids)
eq_scalar = eq.Scalar(positions_default, 0)
to_dtype = to.dtype(eq_scalar, torch.float32)
unsqueeze_default = unsqueeze(to_dtype, -1)
"""


def protected(config: ToyConfig = NO_ROPE) -> Program:
    """Linear inputs in 8 bits; row 0 is a quarter of itself in front of all quantisers."""
    place = PlaceQuantizers(
        weights=16, activations=8, cache=16, block=0, embedding_bits=16, head_bits=16
    )
    program = with_sites(config, place)
    for record in program.activation_quantizers:
        module: Any = program.module.get_submodule(record.module)
        module.set_range(torch.tensor(1 / 64), torch.tensor(128.0))
    program.facts |= {"calibrated", "folded"}
    every = {r.node: 0.25 for r in program.activation_quantizers}
    run_passes(program, (ProtectFirstPosition(every), FreezeQuantizers()))
    return program


def test_the_factor_of_the_first_token_follows_the_cache() -> None:
    """With the quantisers at work, for without them the factor cancels wherever it stands."""
    program = protected()
    expected = whole(program)
    assert run(program, CACHE).changed == 1
    assert span(program, "positions_default", "unsqueeze_default") == FIRST
    for chunk in (1, 4, 11):
        assert relative_error(decoded(program, chunk=chunk), expected) < EXACT
    ids = torch.cat((torch.full((2, 3), 60), IDS), 1)
    mask = torch.cat((torch.zeros(2, 3, dtype=torch.int64), torch.ones_like(IDS)), 1)
    logits, *_ = step(program, ids, mask, empty(program))
    assert relative_error(logits[:, 3:], expected) < EXACT


def test_a_factor_that_stays_with_row_0_of_every_run_shows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = protected()
    expected = whole(program)
    monkeypatch.setattr(add_cache, "follow_positions", lambda *_: None)
    run(program, CACHE)  # the proof runs without quantisers, where the factor cancels
    assert relative_error(decoded(program), expected) > VISIBLE


class Learned(nn.Module):
    """A toy with a table of positions at the embedding, as GPT-2 has."""

    def __init__(self, spelling: str = "default") -> None:
        super().__init__()
        self.toy, self.spelling = make_toy(NO_ROPE), spelling
        generator = torch.Generator().manual_seed(9)
        table = torch.randn(MAX_POSITIONS, NO_ROPE.hidden, generator=generator)
        self.table = nn.Parameter(table, requires_grad=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        decoder = self.toy.model
        x, length = decoder.embed_tokens(input_ids), input_ids.shape[1]
        if self.spelling == "default":
            x = x + functional.embedding(torch.arange(length), self.table)
        elif self.spelling == "start":
            x = x + functional.embedding(torch.arange(0, length), self.table)
        elif self.spelling == "count":
            x = x + functional.embedding(torch.arange(2 * length)[::2], self.table)
        elif self.spelling == "offset":  # OPT
            counted = torch.ones_like(input_ids).cumsum(1)
            x = x + functional.embedding(counted + 1, self.table)
        elif self.spelling == "indexed":
            x = x + self.table[torch.ones(length, dtype=torch.int64).cumsum(0)]
        else:
            x = x + self.table[:length]
        for layer in decoder.layers:
            x = layer(x, ())
        return self.toy.lm_head(decoder.norm(x))  # type: ignore[no-any-return]


def learned(spelling: str) -> Program:
    return exported_module(Learned(spelling), make_tokens(ONE, 2, 7), *FIND_SITES)


@pytest.mark.parametrize("spelling", ["default", "start", "offset", "slice"])
def test_learned_positions_follow_the_cache(spelling: str) -> None:
    program = learned(spelling)
    expected = whole(program)
    run(program, CACHE)
    assert relative_error(decoded(program), expected) < EXACT


def test_positions_in_a_spelling_that_is_not_followed_fail_the_proof() -> None:
    words = "the logits of the second chunk differ by .*in a way that the rewrite does not follow"
    with pytest.raises(VerificationError, match=words):
        run(learned("indexed"), CACHE)


def test_what_counts_something_else_is_refused() -> None:
    words = "at arange .*it counts something that is not the positions of the input"
    with pytest.raises(UnsupportedModelError, match=words):
        run(learned("count"), CACHE)


# Wrong variants: the proof sees each of them, and names the first run that differs.


def mirrored_sines(monkeypatch: pytest.MonkeyPatch) -> None:
    change_table(monkeypatch, lambda r: replace(r, sin=-r.sin))


def other_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    change_table(monkeypatch, lambda r: replace(r, interleaved=True))


def shifted_angles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables that differ from the tenth position on: the last tokens of the proof see it."""

    def shift(rotary: Rotary) -> Rotary:
        cos, sin = rotary.cos.clone(), rotary.sin.clone()
        cos[10:], sin[10:] = cos[9:-1].clone(), sin[9:-1].clone()
        return replace(rotary, cos=cos, sin=sin)

    change_table(monkeypatch, shift)


def change_table(monkeypatch: pytest.MonkeyPatch, change: Callable[[Rotary], Rotary]) -> None:
    original = rotary.RotaryTables.of

    def table(*arguments: Any) -> Any:
        return change(original(*arguments))  # type: ignore[arg-type]

    monkeypatch.setattr(rotary.RotaryTables, "of", table)


def use_positions(monkeypatch: pytest.MonkeyPatch, rule: Callable[[Tensor, Tensor], Tensor]
                  ) -> None:
    monkeypatch.setattr(cache_ops, "positions", rule)


def positions_from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    use_positions(
        monkeypatch, lambda mask, ids: torch.arange(ids.shape[1]).expand(ids.shape)
    )


def positions_that_count_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    use_positions(
        monkeypatch,
        lambda mask, ids: torch.arange(mask.shape[1])[-ids.shape[1] :].expand(ids.shape),
    )


def padding_in_sight(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask that only hides the future."""

    def visible(mask: Tensor, queries: int, window: int = 0) -> Tensor:
        ones = torch.ones(mask.shape[0], 1, queries, mask.shape[1], dtype=torch.bool)
        return ones.tril(mask.shape[1] - queries)

    monkeypatch.setattr(cache_ops, "visible", visible)


def future_in_sight(monkeypatch: pytest.MonkeyPatch) -> None:
    def visible(mask: Tensor, queries: int, window: int = 0) -> Tensor:
        return (mask != 0)[:, None, None, :].expand(-1, 1, queries, -1)

    monkeypatch.setattr(cache_ops, "visible", visible)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (mirrored_sines, "the whole sequence"),
        (other_pairs, "the whole sequence"),
        (shifted_angles, "the whole sequence"),
        (positions_from_zero, "the second chunk"),
        # RoPE sees differences only: padding in front of all tokens shifts them alike.
        (positions_that_count_padding, "after padding on the right"),
        (padding_in_sight, "a row padded on the left"),
        (future_in_sight, "the whole sequence"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_wrong_variants(
    monkeypatch: pytest.MonkeyPatch, wrong: Callable[[pytest.MonkeyPatch], None], named: str
) -> None:
    program = with_sites(ONE)
    wrong(monkeypatch)
    with pytest.raises(VerificationError, match=f"the logits of {named} differ by"):
        run(program, CACHE)


@pytest.mark.parametrize("kind", ["key", "value"])
@pytest.mark.parametrize("axis", [1, 3], ids=["head", "channel"])
def test_a_scale_of_another_head_or_channel_fails_the_proof(
    monkeypatch: pytest.MonkeyPatch, kind: str, axis: int
) -> None:
    program = frozen(ONE, 8, channels=True)
    keep = add_cache.set_parameter

    def move(module: nn.Module, name: str, value: Tensor) -> None:
        keep(module, name, value.roll(1, axis) if name.endswith(f"{kind}_scale") else value)

    monkeypatch.setattr(add_cache, "set_parameter", move)
    with pytest.raises(VerificationError, match="the logits of the whole sequence differ by"):
        run(program, CACHE)


def test_padding_that_counts_shows_where_positions_are_learned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = learned("default")
    positions_that_count_padding(monkeypatch)
    with pytest.raises(VerificationError, match="the logits of a row padded on the left differ"):
        run(program, CACHE)


def test_positions_left_as_they_are_fail_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    program = learned("default")
    monkeypatch.setattr(add_cache, "follow_positions", lambda *_: None)
    with pytest.raises(VerificationError, match="the logits of the second chunk differ by"):
        run(program, CACHE)


@pytest.mark.parametrize("bits", [16, 8])
def test_twice(bits: int) -> None:
    program = with_sites(ONE) if bits == 16 else frozen(ONE, bits, channels=True)
    run(program, CACHE)
    inputs, outputs = program.inputs, program.outputs
    assert_settled(program, CACHE)
    assert (program.inputs, program.outputs) == (inputs, outputs)
