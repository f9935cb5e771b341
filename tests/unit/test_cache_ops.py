"""The operators of a model with a cache: what is stored reads back, turns, and hides."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fptq_compiler.graph import cache_ops
from fptq_compiler.graph.cache_ops import (
    decode,
    encode,
    rotate,
    split_heads,
    visible,
)
from fptq_compiler.quant.pairs import pack_pairs, unpack_pairs

PROPERTY = settings(deadline=None, derandomize=True, max_examples=30)
ROUNDING = 1e-12  # float64 sums of a few products of numbers around 1
SCALES = st.floats(1e-4, 1e2)
SEEDS = st.integers(0, 2**31)
BITS = st.sampled_from((4, 8))


def scale_of(size: float, channels: bool) -> Tensor:
    """One scale, or one for each of 2 heads of 4 channels."""
    if not channels:
        return torch.full((1, 1, 1, 1), size)
    return size * torch.linspace(0.25, 2.0, 8).view(1, 2, 1, 4)


def random(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# Codes.


@PROPERTY
@given(seed=SEEDS, half=st.integers(1, 9))
def test_packed_codes_read_back(seed: int, half: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (2, 3, 2 * half), generator=generator, dtype=torch.int8)
    packed = pack_pairs(codes)
    assert (packed.dtype, packed.shape) == (torch.uint8, (2, 3, half))
    found = unpack_pairs(packed)
    assert found.dtype == torch.int8
    assert torch.equal(found, codes)


def test_every_byte_reads_back() -> None:
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 256)
    codes = unpack_pairs(every)
    assert (int(codes.min()), int(codes.max())) == (-8, 7)
    assert torch.equal(pack_pairs(codes), every)


def test_the_even_channel_lies_in_the_low_half_plus_eight() -> None:
    codes = torch.tensor([[-8, 7, 0, -1]], dtype=torch.int8)
    assert pack_pairs(codes).tolist() == [[0 | 15 << 4, 8 | 7 << 4]]
    assert unpack_pairs(torch.tensor([[0x21, 0xF0]], dtype=torch.uint8)).tolist() == [
        [1 - 8, 2 - 8, 0 - 8, 15 - 8]
    ]


@PROPERTY
@given(seed=SEEDS, size=SCALES, bits=BITS, channels=st.booleans())
def test_codes_encode_to_themselves(seed: int, size: float, bits: int, channels: bool) -> None:
    """A value on the grid is stored without loss, so that storing twice is storing once."""
    generator = torch.Generator().manual_seed(seed)
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (1, 2, 3, 4), generator=generator, dtype=torch.int8)
    stored = codes if bits == 8 else pack_pairs(codes)
    scale = scale_of(size, channels)
    values = decode(stored, scale, bits, torch.float32)
    assert values.dtype == torch.float32
    assert torch.equal(encode(values, scale, bits), stored)


@PROPERTY
@given(seed=SEEDS, size=SCALES, bits=BITS, channels=st.booleans())
def test_what_is_stored_is_the_nearest_code(
    seed: int, size: float, bits: int, channels: bool
) -> None:
    scale = scale_of(size, channels)
    x = random(seed, 1, 2, 3, 4) * scale * 6  # most inside of 4 bits, some beyond
    stored = encode(x, scale, bits)
    assert stored.dtype == cache_ops.CACHE_DTYPES[bits]
    assert stored.shape[-1] == (2 if bits == 4 else 4)
    values = decode(stored, scale, bits, torch.float64)
    step = scale.double()  # scales are float32 in the file
    lowest, highest = -(1 << (bits - 1)) * step, ((1 << (bits - 1)) - 1) * step
    nearest = x.clamp(lowest, highest)
    assert bool(((values - nearest).abs() <= step / 2 * (1 + ROUNDING)).all())
    assert bool((values >= lowest).all())
    assert bool((values <= highest).all())
    assert torch.equal(cache_ops.stored(x, scale, bits), values)


@pytest.mark.parametrize(("bits", "lowest", "highest"), [(8, -128, 127), (4, -8, 7)])
def test_codes_saturate_and_ties_go_to_even(bits: int, lowest: int, highest: int) -> None:
    x = torch.tensor([-1e9, 1e9, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]).reshape(1, 1, 1, 8)
    codes = encode(x * 0.5, torch.tensor(0.5), bits)
    codes = codes if bits == 8 else unpack_pairs(codes)
    assert codes.flatten().tolist() == [lowest, highest, 0, 2, 2, 0, -2, -2]


def test_a_float_cache_is_what_it_is() -> None:
    x = random(0, 1, 2, 3, 4)
    assert encode(x, None, 16) is x
    assert decode(x, None, 16, torch.float32) is x


# Angles.


def turn(x: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    return rotate(x, angles.cos(), angles.sin(), interleaved)


WIDTHS = st.tuples(st.integers(1, 4), st.integers(0, 3))  # pairs, channels that pass


@PROPERTY
@given(seed=SEEDS, widths=WIDTHS, interleaved=st.booleans())
def test_rotations_keep_lengths_and_turn_back(
    seed: int, widths: tuple[int, int], interleaved: bool
) -> None:
    pairs, rest = widths
    x, angles = random(seed, 2, 3, 2, 2 * pairs + rest), random(seed + 1, 2, 3, pairs)
    found = turn(x, angles, interleaved)
    assert found.shape == x.shape
    assert torch.equal(found[..., 2 * pairs :], x[..., 2 * pairs :])
    assert torch.allclose(found.norm(dim=-1), x.norm(dim=-1), rtol=ROUNDING)
    back = turn(found, -angles, interleaved)
    assert float((back - x).abs().max()) <= ROUNDING
    assert torch.equal(turn(x, torch.zeros_like(angles), interleaved), x)


@PROPERTY
@given(seed=SEEDS, pairs=st.integers(1, 4), interleaved=st.booleans(), shift=st.integers(1, 50))
def test_products_depend_on_the_distance_alone(
    seed: int, pairs: int, interleaved: bool, shift: int
) -> None:
    """Which makes RoPE what it is, and a cache of turned keys possible."""
    q, k = random(seed, 1, 1, 1, 2 * pairs), random(seed + 1, 1, 1, 1, 2 * pairs)
    frequencies = random(seed + 2, pairs).abs()
    products = [
        (turn(q, (7 + s) * frequencies.view(1, 1, -1), interleaved)
         * turn(k, (3 + s) * frequencies.view(1, 1, -1), interleaved)).sum()
        for s in (0, shift)
    ]
    # Angles of up to 57 times a few radians are 1e-14 off.
    assert float((products[0] - products[1]).abs()) <= 100 * ROUNDING


@pytest.mark.parametrize(
    ("interleaved", "expected"),
    [(False, [-3.0, -4.0, 1.0, 2.0, 5.0]), (True, [-2.0, 1.0, -4.0, 3.0, 5.0])],
    ids=["halves", "neighbours"],
)
def test_a_quarter_turn(interleaved: bool, expected: list[float]) -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).view(1, 1, 1, 5)
    cos, sin = torch.zeros(1, 1, 2), torch.ones(1, 1, 2)
    assert rotate(x, cos, sin, interleaved).flatten().tolist() == expected


@PROPERTY
@given(seed=SEEDS, pairs=st.integers(1, 4))
def test_halves_are_neighbours_in_another_order(seed: int, pairs: int) -> None:
    x, angles = random(seed, 1, 2, 1, 2 * pairs), random(seed + 1, 1, 2, pairs)
    order = torch.arange(2 * pairs).view(2, pairs).t().flatten()
    halves, neighbours = turn(x, angles, False), turn(x[..., order], angles, True)
    assert float((halves[..., order] - neighbours).abs().max()) <= ROUNDING


# Positions and masks.

MASKS = st.lists(st.integers(0, 1), min_size=1, max_size=9)


@PROPERTY
@given(row=MASKS, data=st.data())
def test_positions_count_the_tokens_before(row: list[int], data: st.DataObject) -> None:
    new = data.draw(st.integers(1, len(row)))
    mask = torch.tensor([row, [1] * len(row)])
    found = cache_ops.positions(mask, torch.zeros(2, new, dtype=torch.int64))
    assert (found.dtype, found.shape) == (torch.int64, (2, new))
    every = [sum(row[:i]) if row[i] else max(sum(row[:i]) - 1, 0) for i in range(len(row))]
    assert found[0].tolist() == every[len(row) - new :]
    assert found[1].tolist() == list(range(len(row) - new, len(row)))


@PROPERTY
@given(row=MASKS, data=st.data())
def test_a_query_sees_the_tokens_before_it_and_itself(
    row: list[int], data: st.DataObject
) -> None:
    queries = data.draw(st.integers(1, len(row)))
    found = visible(torch.tensor([row, [1] * len(row)]), queries)
    assert found.shape == (2, 1, queries, len(row))
    assert found.dtype == torch.bool
    past = len(row) - queries
    for q in range(queries):
        shown = [(row[k] == 1 and k <= past + q) or k == past + q for k in range(len(row))]
        assert found[0, 0, q].tolist() == shown
        assert found[1, 0, q].tolist() == [k <= past + q for k in range(len(row))]


@PROPERTY
@given(
    seed=SEEDS, heads=st.sampled_from(((1, 1), (2, 1), (4, 2), (3, 3))),
    bits=st.sampled_from((4, 8, 16)), first=st.integers(1, 6), rotary=st.booleans(),
    channels=st.booleans(),
)
def test_chunks_are_the_whole(
    seed: int, heads: tuple[int, int], bits: int, first: int, rotary: bool, channels: bool
) -> None:
    """Seven tokens at once, or `first` of them and then the rest: outputs and caches."""
    count, kv = heads
    q, k, v = (random(seed + i, 2, 7, 4 * n) for i, n in enumerate((count, kv, kv)))
    angles = torch.arange(7.0).double().outer(torch.tensor([1.0, 0.1]).double())
    table = (angles.cos(), angles.sin()) if rotary else (None, None)
    width = 2 if bits == 4 else 4
    empty = torch.zeros(2, kv, 0, width, dtype=cache_ops.CACHE_DTYPES[bits])
    empty = empty.double() if bits == 16 else empty
    shape = (1, kv, 1, 4) if channels else (1, 1, 1, 1)
    steps = [random(seed + n, *shape).float().abs() + 0.25 for n in (4, 5)]
    scales = [None, None] if bits == 16 else steps

    def attend(tokens: slice, past: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        mask = torch.ones(2, tokens.stop, dtype=torch.int64)
        new = torch.zeros(2, tokens.stop - tokens.start, dtype=torch.int64)
        found: tuple[Tensor, ...] = cache_ops.cached_attention(
            q[:, tokens], k[:, tokens], v[:, tokens], *past, mask,
            cache_ops.positions(mask, new), *table, False, count, kv, 0.5, bits, *scales,
        )
        return found

    whole, *present = attend(slice(0, 7), (empty, empty))
    head, *past = attend(slice(0, first), (empty, empty))
    tail, *grown = attend(slice(first, 7), tuple(past))
    assert float((torch.cat((head, tail), 1) - whole).abs().max()) <= ROUNDING
    for one, other in zip(grown, present, strict=True):
        assert one.dtype == cache_ops.CACHE_DTYPES[bits] or bits == 16
        assert torch.equal(one, other)


@PROPERTY
@given(seed=SEEDS, heads=st.sampled_from(((1, 1), (4, 2), (3, 3))), bits=BITS)
def test_packed_projections_are_taken_apart(seed: int, heads: tuple[int, int], bits: int) -> None:
    """Query, key and value side by side in one tensor give what they give apart."""
    count, kv = heads
    parts = [random(seed + i, 2, 3, 4 * n) for i, n in enumerate((count, kv, kv))]
    past = torch.zeros(2, kv, 0, 2 if bits == 4 else 4, dtype=cache_ops.CACHE_DTYPES[bits])
    mask = torch.ones(2, 3, dtype=torch.int64)
    at = torch.arange(3).expand(2, 3)
    table = (random(seed + 3, 5, 2), random(seed + 4, 5, 2))
    scales = (torch.full((1, 1, 1, 1), 0.25), torch.linspace(0.25, 0.5, 4 * kv).view(1, kv, 1, 4))
    rest = (past, past, mask, at, *table, True, count, kv, 0.5, bits, *scales)
    apart = cache_ops.cached_attention(*parts, *rest)
    together = cache_ops.cached_attention(torch.cat(parts, 2), None, None, *rest)
    for one, other in zip(apart, together, strict=True):
        assert torch.equal(one, other)


def test_heads_lie_side_by_side() -> None:
    x = torch.arange(12).view(1, 2, 6)
    assert split_heads(x, 3).tolist() == [[[[0, 1], [2, 3], [4, 5]], [[6, 7], [8, 9], [10, 11]]]]
