"""add_cache done wrongly: the proof sees each variant and names the first run that differs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fptq_compiler.errors import VerificationError
from fptq_compiler.graph import cache_ops, rotary
from fptq_compiler.graph.rotary import Rotary
from fptq_compiler.passes import add_cache
from tests.passes.cached_runs import CACHE, frozen
from tests.passes.learned_positions import learned
from tests.passes.steps import ONE, run, with_sites


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

    def table(*arguments: Any) -> Rotary:
        found = original(*arguments)
        assert isinstance(found, Rotary)
        return change(found)

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
