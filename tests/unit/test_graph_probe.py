"""The probe: what a region computes is read off its values, whatever its spelling."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

from fptq_compiler.graph.probe import SEQUENCE, Probe, Refusal, between, outside_reader
from fptq_compiler.graph.sites import RopeLayout

BATCH, HEADS, WIDTH = 2, 3, 8
CHANNELS = HEADS * WIDTH
HALVES = tuple((i, i + WIDTH // 2) for i in range(WIDTH // 2))

Function = Callable[[Tensor], Tensor]


def _traced(function: Function, *shape: int) -> tuple[Probe, Node, Node]:
    """The probe of a function's graph, the node that it reads and the node that it returns."""
    module = make_fx(function, tracing_mode="fake")(torch.zeros(shape))
    nodes = list(module.graph.nodes)
    (result,) = nodes[-1].all_input_nodes
    return Probe(module), nodes[0], result


def _heads(x: Tensor) -> Tensor:
    return x.view(BATCH, SEQUENCE, HEADS, WIDTH).transpose(1, 2)


def _tables(width: int = WIDTH) -> tuple[Tensor, Tensor]:
    frequencies = 100.0 ** -(torch.arange(0, width, 2).float() / width)
    angles = torch.arange(SEQUENCE)[:, None] * frequencies
    return torch.cos(angles), torch.sin(angles)


def _turn_halves(x: Tensor, sign: float = 1.0) -> Tensor:
    """RoPE on two halves; with sign -1 a reflection that depends on the position."""
    cosine, sine = _tables(x.shape[-1])
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cosine - sign * high * sine, low * sine + sign * high * cosine), -1)


def _turn_pairs(x: Tensor) -> Tensor:
    cosine, sine = _tables()
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), -1).flatten(-2)


def _rope(function: Function) -> RopeLayout | Refusal:
    probe, source, target = _traced(lambda x: function(_heads(x)), BATCH, SEQUENCE, CHANNELS)
    found = probe.channel_source(source, target, CHANNELS)
    if isinstance(found, Refusal):
        return found
    return probe.rope(source, target, *found)


def test_half_split() -> None:
    assert _rope(_turn_halves) == RopeLayout(HALVES, (), 1.0, "half-split")


def test_interleaved() -> None:
    pairs = tuple((i, i + 1) for i in range(0, WIDTH, 2))
    assert _rope(_turn_pairs) == RopeLayout(pairs, (), 1.0, "interleaved")


def test_complex_numbers_are_interleaved() -> None:
    def turn(x: Tensor) -> Tensor:
        numbers = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(numbers * torch.complex(*_tables())).flatten(-2)

    found = _rope(turn)
    assert isinstance(found, RopeLayout)
    assert found.style == "interleaved"


def test_a_common_scale_is_read_off() -> None:
    """YaRN multiplies its tables by an attention factor."""
    found = _rope(lambda x: _turn_halves(x) * 1.25)
    assert isinstance(found, RopeLayout)
    assert found.pairs == HALVES
    # The tables are float32, so the factor is known to 1e-7.
    assert found.scale == pytest.approx(1.25, rel=1e-6)


def test_partial_rotary_passes_the_rest() -> None:
    found = _rope(lambda x: torch.cat((_turn_halves(x[..., :4]), x[..., 4:]), -1))
    assert found == RopeLayout(((0, 2), (1, 3)), (4, 5, 6, 7), 1.0, "half-split")


def test_no_rope_passes_everything() -> None:
    assert _rope(lambda x: x * 1.0) == RopeLayout((), tuple(range(WIDTH)), 1.0, "none")


def test_a_permuted_output_is_followed_to_its_channels() -> None:
    """Some models sort interleaved channels into halves first: the scores do not mind."""

    def turn(x: Tensor) -> Tensor:
        return _turn_halves(torch.cat((x[..., 0::2], x[..., 1::2]), -1))

    probe, source, target = _traced(lambda x: turn(_heads(x)), BATCH, SEQUENCE, CHANNELS)
    found = probe.channel_source(source, target, CHANNELS)
    assert not isinstance(found, Refusal)
    index, factor = found
    assert index[1].tolist() == [8, 10, 12, 14, 9, 11, 13, 15]
    # Channels in the operand's order; `index` says which of the projection's they are.
    assert probe.rope(source, target, index, factor) == RopeLayout(HALVES, (), 1.0, "half-split")


def test_turning_the_other_way_is_a_rotation_too() -> None:
    def turn(x: Tensor) -> Tensor:
        low, high = _turn_halves(x, -1.0).chunk(2, dim=-1)
        return torch.cat((low, -high), -1)

    assert _rope(turn) == RopeLayout(HALVES, (), 1.0, "half-split")


def test_pairs_in_no_usual_order_are_other() -> None:
    order = [0, 7, 1, 6, 2, 5, 3, 4]
    found = _rope(lambda x: _turn_pairs(x[..., order])[..., torch.tensor(order).argsort()])
    assert found == RopeLayout(((0, 7), (1, 6), (2, 5), (3, 4)), (), 1.0, "other")


def _shear(x: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low + high * _tables()[1], high), -1)


def _grow(x: Tensor) -> Tensor:
    return x * (1.0 + torch.arange(SEQUENCE)[:, None] / 8)


def _blend(x: Tensor) -> Tensor:
    return x + torch.arange(SEQUENCE)[:, None] * x.sum(-1, keepdim=True)


def _heads_apart(x: Tensor) -> Tensor:
    return torch.cat((x[:, :1], _turn_halves(x[:, 1:])), 1)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (_shear, "channel 4 moves to 0 but not back"),
        (_grow, "channels that do not rotate change with the position"),
        (_blend, "a channel mixes with more than one other: not a rotation of pairs"),
        (_heads_apart, "the heads are not treated alike"),
        (lambda x: x + x.cumsum(2) - x, "the heads or the tokens mix before attention"),
        (lambda x: x + 1.0, "something is added that does not come from the projection"),
        (lambda x: x * x, "the path is not linear (a norm or an activation stands in it)"),
        (
            lambda x: torch.cat((x[..., :4], 2 * x[..., 4:]), -1),
            "at position 0 the heads do not hold scaled channels of the projection",
        ),
    ],
    ids=["shear", "grow", "blend", "heads", "tokens", "bias", "square", "scales"],
)
def test_what_is_no_rope_is_refused_in_words(function: Function, reason: str) -> None:
    found = _rope(function)
    assert isinstance(found, Refusal)
    assert found.reason == reason
    assert isinstance(found.node, Node)


def test_a_reflection_is_no_rotation() -> None:
    """At position 0 the second half changes its sign, which is no common scale."""
    found = _rope(lambda x: _turn_halves(x, -1.0))
    assert isinstance(found, Refusal)
    assert found.reason == "at position 0 the heads do not hold scaled channels of the projection"


def test_a_swap_is_no_rotation() -> None:
    """From position 1 on each pair changes places: symmetric, hence of determinant -1."""

    def swap(x: Tensor) -> Tensor:
        later = (torch.arange(SEQUENCE)[:, None] > 0).float()
        return x * (1 - later) + torch.cat(x.chunk(2, -1)[::-1], -1) * later

    found = _rope(swap)
    assert isinstance(found, Refusal)
    assert found.reason == (
        "channels 0 and 4 do not rotate: the map between them at some position is no rotation"
    )


# Head split and merge


def _is_split(function: Function) -> bool:
    """Whether the probe takes a function for the split of channels into heads, in order."""
    probe, source, target = _traced(function, BATCH, SEQUENCE, CHANNELS)
    found = probe.channel_source(source, target, CHANNELS)
    if isinstance(found, Refusal):
        return False
    index, factor = found
    ordered = index.flatten().tolist() == list(range(CHANNELS))
    return ordered and probe.is_head_split(source, target, index, factor)


def _is_merge(function: Function) -> bool:
    probe, source, target = _traced(function, BATCH, HEADS, SEQUENCE, WIDTH)
    return probe.is_head_merge(source, target)


orders = st.permutations(range(4))
few = settings(max_examples=25, derandomize=True, deadline=None, database=None)


@few
@given(order=orders, heads=st.sampled_from([HEADS, WIDTH]))
def test_exactly_the_head_splits_are_accepted(order: list[int], heads: int) -> None:
    """All orders of the axes (B, S, H, D), cut either way, made into (B, H, S, D)."""

    def function(x: Tensor) -> Tensor:
        cut = x.reshape(BATCH, SEQUENCE, heads, CHANNELS // heads)
        return cut.permute(order).reshape(BATCH, HEADS, SEQUENCE, WIDTH)

    x = torch.arange(BATCH * SEQUENCE * CHANNELS).view(BATCH, SEQUENCE, CHANNELS)
    assert _is_split(function) == function(x).equal(_heads(x))


@few
@given(order=orders)
def test_exactly_the_head_merges_are_accepted(order: list[int]) -> None:
    def function(x: Tensor) -> Tensor:
        return x.permute(order).reshape(BATCH, SEQUENCE, CHANNELS)

    x = torch.arange(BATCH * HEADS * SEQUENCE * WIDTH).view(BATCH, HEADS, SEQUENCE, WIDTH)
    expected = x.transpose(1, 2).reshape(BATCH, SEQUENCE, CHANNELS)
    assert _is_merge(function) == function(x).equal(expected)


def test_the_right_split_and_merge_are_accepted() -> None:
    """What the two tests above might never draw."""
    assert _is_split(_heads)
    assert _is_merge(lambda x: x.permute(0, 2, 1, 3).flatten(2))


@pytest.mark.parametrize(
    ("repeat", "accepted"),
    [
        (lambda x: x.repeat_interleave(2, 1), True),
        (lambda x: x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(BATCH, 6, SEQUENCE, 8), True),
        (lambda x: x.repeat(1, 2, 1, 1), False),
        (lambda x: x.repeat_interleave(2, 2)[:, :, :SEQUENCE], False),
    ],
    ids=["interleave", "expand", "tile", "tokens"],
)
def test_repeated_heads(repeat: Function, accepted: bool) -> None:
    probe, source, target = _traced(repeat, BATCH, HEADS, SEQUENCE, WIDTH)
    assert probe.repeats_heads(source, target) is accepted


def test_between_and_outside_reader() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    a = graph.call_function(torch.neg, (x,))
    b = graph.call_function(torch.abs, (a,))
    side = graph.call_function(torch.cos, (a,))
    target = graph.call_function(torch.add, (b, 1))
    region = between(x, target)
    assert region == {a, b, target}
    assert outside_reader(x, region, target) is side
    assert outside_reader(x, region | {side}, target) is None
