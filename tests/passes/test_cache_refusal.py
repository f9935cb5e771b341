"""add_cache near misses: each is refused by name before anything is changed."""

from __future__ import annotations

import types
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional

from fptq_compiler.errors import UnsupportedModelError
from fptq_compiler.graph.dump import dump
from fptq_compiler.graph.pipeline import run_passes
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.unlift import unlift
from fptq_compiler.passes import FIND_SITES
from tests import toys
from tests.passes.cached_runs import CACHE, NO_ROPE, Attend, attending, frozen
from tests.passes.steps import ONE, edited, exported_module, run, with_sites
from tests.toys import MAX_POSITIONS, Toy, ToyConfig, make_tokens, make_toy


def assert_refused(program: Program, words: str) -> None:
    before = dump(program.module)
    with pytest.raises(UnsupportedModelError, match=words) as caught:
        run(program, CACHE)
    assert str(caught.value).startswith("--kv-cache: attention at ")
    assert str(caught.value).endswith("Compile without --kv-cache.")
    assert dump(program.module) == before
    assert "cached" not in program.facts


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
        attention: Any = toy.model.layers[1].self_attn
        attention.attend = types.MethodType(rectified, attention)

    assert_refused(edited(ToyConfig(), change, *FIND_SITES), "attention at ")


def strided(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every other token of the past."""
    at = torch.arange(q.shape[-2])
    shown = (at[None, :] <= at[:, None]) & ((at[:, None] - at[None, :]) % 2 == 0)
    return functional.scaled_dot_product_attention(q, k, v, shown, scale=self.scale)


def everywhere(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, scale=self.scale)


@pytest.mark.parametrize("attend", [strided, everywhere])
def test_a_mask_that_is_not_causal(monkeypatch: pytest.MonkeyPatch, attend: Attend) -> None:
    program = attending(monkeypatch, attend)
    line = r"\(File .*toys\.py"
    assert_refused(program, rf"attention_default .*mask is not the plain causal one {line}")


def test_one_layer_that_cannot_refuses_the_model() -> None:
    def edit(toy: Toy) -> None:
        attention: Any = toy.model.layers[1].self_attn
        attention.attend = lambda q, k, v: everywhere(attention, q, k, v)

    program = edited(ToyConfig(), edit, *FIND_SITES)
    assert_refused(program, "attention_default_1 .*its mask is not the plain causal one")


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
        return cast(Tensor, self.toy.lm_head(decoder.norm(x)))


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


def test_values_that_are_wider_than_keys() -> None:
    toy = make_toy(NO_ROPE)

    def forward(self: Any, x: Tensor, tables: object) -> Tensor:
        q, k = (
            t.view(*x.shape[:-1], -1, 8).transpose(1, 2) for t in (self.q_proj(x), self.k_proj(x))
        )
        v = self.v_proj(x).view(*x.shape[:-1], 2, 16).transpose(1, 2)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return cast(Tensor, self.o_proj(mixed.transpose(1, 2).flatten(2)))

    attention: Any = toy.model.layers[0].self_attn
    attention.forward = types.MethodType(forward, attention)
    attention.v_proj = nn.Linear(24, 32, bias=False)
    attention.o_proj = nn.Linear(64, 24, bias=False)
    toy.requires_grad_(False)
    program = exported_module(toy, make_tokens(ONE, 2, 7), *FIND_SITES)
    assert_refused(program, "keys and values differ in heads or channels")


def test_an_asymmetric_quantiser_is_refused() -> None:
    program = frozen(ONE, 8, symmetric=False)
    words = r"at \w+_key_frozen cannot be .*its grid has a zero-point, 0, expected a symmetric one"
    assert_refused(program, words)
