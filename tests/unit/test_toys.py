"""The toys are what they say: exportable, dynamic, alive, causal and equal where they must be."""

import dataclasses
import re
import typing

import pytest
import torch
from torch import Tensor

from tests.toys import (
    MAX_POSITIONS,
    SPELLINGS,
    Toy,
    ToyConfig,
    export_toy,
    make_tokens,
    make_toy,
    name_spelling,
)

every_spelling = pytest.mark.parametrize("config", SPELLINGS, ids=name_spelling)

TOLERANCE = 1e-5
"""Absolute, on float32 logits of unit size: sums in another order differ by about 1e-6."""


@every_spelling
def test_export_equals_eager_at_every_shape(config: ToyConfig, generator: torch.Generator) -> None:
    toy, exported = make_toy(config), export_toy(config).module()
    for batch, length in [(1, 1), (2, 7), (3, 5), (1, MAX_POSITIONS)]:
        tokens = make_tokens(config, batch, length, generator)
        expected = toy(tokens)
        assert expected.shape == (batch, length, config.vocabulary)
        assert expected.dtype == config.dtype
        # No tolerance: the graph calls the same kernels on the same values.
        torch.testing.assert_close(exported(tokens), expected, rtol=0, atol=0)


@every_spelling
def test_every_parameter_moves_the_logits(config: ToyConfig, generator: torch.Generator) -> None:
    toy, tokens = make_toy(config), make_tokens(config, 2, 12, generator)
    before = toy(tokens)
    for name, parameter in toy.named_parameters():
        kept = parameter.data
        parameter.data = kept.roll(1, dims=0)  # not a scale: a norm behind q would undo it
        change = (toy(tokens) - before).norm() / before.norm()
        parameter.data = kept
        # The weakest branch moves them by several per cent; bfloat16 rounds to 0.4 per cent.
        assert change > 0.01, name


@every_spelling
def test_attention_is_causal(config: ToyConfig, generator: torch.Generator) -> None:
    toy, tokens = make_toy(config), make_tokens(config, 2, 12, generator)
    changed = tokens.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % config.vocabulary
    before, after = toy(tokens), toy(changed)
    torch.testing.assert_close(after[:, :8], before[:, :8], rtol=0, atol=0)
    assert (after[:, 8:] - before[:, 8:]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (ToyConfig(), ToyConfig(attention="eager")),
        (ToyConfig(), ToyConfig(gqa="repeat_interleave")),
        (ToyConfig(), ToyConfig(gqa="enable_gqa")),
        (ToyConfig(), ToyConfig(attention="eager", gqa="repeat_interleave")),
        (ToyConfig(kv_heads=1), ToyConfig(kv_heads=1, gqa="enable_gqa")),
        (ToyConfig(rope="interleaved"), ToyConfig(rope="complex")),
        (ToyConfig(), ToyConfig(norm="spelled")),
        (ToyConfig(), ToyConfig(norm="spelled_mul")),
        (ToyConfig(qk_norm=True), ToyConfig(qk_norm=True, norm="one_plus")),
    ],
    ids=name_spelling,
)
def test_spellings_of_one_function_agree(
    one: ToyConfig, other: ToyConfig, seed: int, generator: torch.Generator
) -> None:
    tokens = make_tokens(one, 2, 12, generator)
    assert_agree(make_toy(other, seed)(tokens), make_toy(one, seed)(tokens))


@pytest.mark.parametrize(
    "config",
    [
        ToyConfig(packed_qkv="split"),
        ToyConfig(packed_qkv="slice"),
        ToyConfig(packed_qkv="chunk", kv_heads=4),
        ToyConfig(packed_qkv="split", attention_bias=True),
        ToyConfig(packed_gate_up="chunk"),
        ToyConfig(packed_gate_up="slice", mlp_bias=True),
    ],
    ids=name_spelling,
)
def test_packing_changes_nothing(config: ToyConfig, seed: int, generator: torch.Generator) -> None:
    plain = make_toy(dataclasses.replace(config, packed_qkv="none", packed_gate_up="none"), seed)
    packed, tokens = make_toy(config, seed), make_tokens(config, 2, 12, generator)
    packed.load_state_dict(pack(plain, packed))
    assert_agree(packed(tokens), plain(tokens))


def test_half_and_interleaved_rope_differ_by_the_order_of_channels(
    seed: int, generator: torch.Generator
) -> None:
    half = make_toy(ToyConfig(rope="half"), seed)
    interleaved = make_toy(ToyConfig(rope="interleaved"), seed)
    tokens = make_tokens(half.config, 2, 12, generator)
    assert (interleaved(tokens) - half(tokens)).abs().max() > 0.1
    pairs = half.config.head_dim // 2
    state = half.state_dict()
    for name, weight in state.items():
        if "q_proj" in name or "k_proj" in name:
            heads = weight.view(-1, 2, pairs, half.config.hidden)  # [heads, half, pair, hidden]
            state[name] = heads.transpose(1, 2).reshape(weight.shape)
    interleaved.load_state_dict(state)
    assert_agree(interleaved(tokens), half(tokens))


@pytest.mark.parametrize("norm", ["op", "one_plus"])
def test_gains_lie_around_one(norm: typing.Literal["op", "one_plus"], seed: int) -> None:
    toy = make_toy(ToyConfig(norm=norm, qk_norm=True), seed)
    offset = 1.0 if norm == "one_plus" else 0.0
    gains = [value + offset for name, value in toy.named_parameters() if "norm" in name]
    assert len(gains) == 4 * toy.config.layers + 1
    for gain in gains:
        assert gain.min() >= 0.5
        assert gain.max() <= 1.5
        assert gain.std() > 0.1


def test_seed_alone_decides_the_weights() -> None:
    first, again, other = (make_toy(ToyConfig(), seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_names_are_those_of_llama() -> None:
    layer = {
        *(f"self_attn.{part}_proj.weight" for part in "qkvo"),
        *(f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
    }
    assert set(make_toy(ToyConfig(layers=1)).state_dict()) == {
        *(f"model.layers.0.{name}" for name in layer),
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    }


def test_spellings_cover_every_option() -> None:
    hints = typing.get_type_hints(ToyConfig)
    for field in dataclasses.fields(ToyConfig):
        options = typing.get_args(hints[field.name]) or (True, False) * (hints[field.name] is bool)
        seen = {getattr(config, field.name) for config in SPELLINGS}
        assert seen >= set(options), field.name
    names = [name_spelling(config) for config in SPELLINGS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_heads": 3}, "heads=4 is no multiple of kv_heads=3"),
        ({"head_dim": 6}, "head_dim=6 is no multiple of 4"),
        ({"packed_qkv": "chunk"}, "packed_qkv='chunk' needs parts of one size"),
        ({"attention": "eager", "gqa": "enable_gqa"}, "enable_gqa is an argument of"),
        ({"value_readers": 3}, "value_readers=3 is neither 1 nor 2"),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_impossible_combinations_are_refused(options: dict[str, typing.Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ToyConfig(**options)


def assert_agree(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


def pack(plain: Toy, packed: Toy) -> dict[str, Tensor]:
    """Return plain's weights under packed's names: packed rows are the parts' rows in order."""
    source = plain.state_dict()
    parts = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    result = {}
    for name in packed.state_dict():
        module = name.split(".")[-2]
        names = [name.replace(module, part) for part in parts.get(module, (module,))]
        result[name] = torch.cat([source[part] for part in names])
    return result
