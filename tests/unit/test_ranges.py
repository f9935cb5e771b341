"""Clip searches are never worse than min-max and about as good as an exhaustive search."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fptq_compiler.quant import (
    Grid,
    PerBlock,
    PerChannel,
    PerTensor,
    activation_range,
    channel_scale,
    fake_quantize,
    minmax_range,
    minmax_scale,
    weight_scale,
)
from fptq_compiler.quant.samples import thin

PROPERTY = settings(deadline=None, derandomize=True, max_examples=25)
GRANULARITIES = [PerTensor(), PerChannel(0), PerChannel(1), PerBlock(1, 8), PerBlock(0, 5)]
ROUNDING = 1 + 1e-5  # the searches compare sums in float32


def _heavy(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp()


def _loss(x: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid, p: float) -> float:
    return float((fake_quantize(x, scale, zero_point, grid) - x).double().abs().pow(p).sum())


@PROPERTY
@given(
    seed=st.integers(0, 999),
    bits=st.sampled_from([2, 3, 4, 8]),
    p=st.sampled_from([1.0, 2.0, 2.4, 3.0, 4.0]),
    granularity=st.sampled_from(GRANULARITIES),
)
def test_weight_scale_is_never_worse_than_minmax(
    seed: int, bits: int, p: float, granularity: PerTensor | PerChannel | PerBlock
) -> None:
    W = _heavy((12, 21), seed)
    grid = Grid(bits, True)
    found = weight_scale(W, grid, granularity, p)
    plain = minmax_scale(W, grid, granularity)
    assert found.shape == plain.shape == granularity.scale_shape(W.shape)
    assert found.dtype == torch.float32
    assert bool((found > 0).all())
    losses = [
        _loss(W, granularity.expand(scale, W.shape), None, grid, p) for scale in (found, plain)
    ]
    assert losses[0] <= losses[1] * ROUNDING


def test_weight_scale_is_near_the_exhaustive_search() -> None:
    W = _heavy((64, 256), 0)
    grid = Grid(4, True)
    widest = minmax_scale(W, grid, PerChannel(0))[:, None]
    every = torch.stack(
        [
            (fake_quantize(W, widest * k / 80, None, grid) - W).abs().pow(2.4).sum(dim=1)
            for k in range(1, 81)
        ]
    )
    found = weight_scale(W, grid, PerChannel(0))[:, None]
    loss = (fake_quantize(W, found, None, grid) - W).abs().pow(2.4).sum(dim=1)
    assert float((loss / every.amin(dim=0)).mean()) < 1.01
    assert float(loss.sum()) < 0.9 * float(every[-1].sum())  # and the search is worth it


def test_each_group_is_searched_by_itself() -> None:
    W = _heavy((6, 20), 1)
    grid = Grid(4, True)
    rows = torch.stack([weight_scale(row, grid, PerTensor()) for row in W])
    torch.testing.assert_close(weight_scale(W, grid, PerChannel(0)), rows)
    torch.testing.assert_close(weight_scale(W.T, grid, PerChannel(1)), rows)
    blocks = weight_scale(W, grid, PerBlock(1, 8))
    torch.testing.assert_close(blocks[:, 2], weight_scale(W[:, 16:], grid, PerChannel(0)))
    turned = weight_scale(W.T.contiguous(), grid, PerBlock(0, 8))
    torch.testing.assert_close(turned, blocks.T)


@pytest.mark.parametrize("value", [0.0, 1e-42, 1e-38, 3e38])
def test_extreme_channels_have_safe_scales(value: float) -> None:
    W = torch.full((2, 8), value)
    W[0] = 1.0
    for scale in (
        weight_scale(W, Grid(4, True), PerChannel(0)),
        minmax_scale(W, Grid(4, True), PerChannel(0)),
    ):
        assert bool(torch.isfinite(scale).all())
        assert bool((scale >= torch.finfo(torch.float32).tiny).all())
        if value < 1e-38:
            assert float(scale[1]) == 1.0


@PROPERTY
@given(
    seed=st.integers(0, 999),
    bits=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
    p=st.sampled_from([2.0, 3.0, 4.0]),
    shape=st.sampled_from(["both", "positive", "negative", "offset", "outlier"]),
)
def test_activation_range_is_never_worse_than_minmax(
    seed: int, bits: int, symmetric: bool, p: float, shape: str
) -> None:
    x = _heavy((20_000,), seed)
    x = {"positive": x.relu(), "negative": -x.relu(), "offset": x + 30.0}.get(shape, x)
    if shape == "outlier":
        x[7] = 1000.0
    grid = Grid(bits, symmetric)
    found, plain = activation_range(x, grid, p), minmax_range(x, grid)
    for scale, zero_point in (found, plain):
        assert scale.shape == zero_point.shape == ()
        assert scale.dtype == zero_point.dtype == torch.float32
        assert float(zero_point) == round(float(zero_point))
        assert grid.lowest <= float(zero_point) <= grid.highest
        assert float(scale) > 0
    assert _loss(x, *found, grid, p) <= _loss(x, *plain, grid, p) * ROUNDING


@pytest.mark.parametrize("bits", [4, 8])
def test_activation_range_is_near_a_dense_search(bits: int) -> None:
    x = _heavy((30_000,), 5)
    x = torch.where(x < 0, x * 0.2, x)
    grid = Grid(bits, False)
    low, high = float(x.min()), float(x.max())
    best = float("inf")
    for low_step in range(1, 41):
        for high_step in range(1, 41):
            scale = (high * high_step - low * low_step) / 40 / grid.highest
            zero_point = torch.tensor(float(round(-low * low_step / 40 / scale)))
            best = min(best, _loss(x, torch.tensor(scale), zero_point, grid, 3))
    assert _loss(x, *activation_range(x, grid), grid, 3) < 1.02 * best


@pytest.mark.parametrize("symmetric", [False, True])
def test_constant_and_zero_activations(symmetric: bool) -> None:
    grid = Grid(8, symmetric)
    for value in (0.0, 5.0, -5.0):
        x = torch.full((100,), value)
        for scale, zero_point in (activation_range(x, grid), minmax_range(x, grid)):
            y = fake_quantize(x, scale, zero_point, grid)
            torch.testing.assert_close(y, x, rtol=1e-2, atol=0)  # half a step of 127
    assert float(activation_range(torch.zeros(3), grid)[0]) == 1.0


def test_thinning_keeps_extremes_and_weight() -> None:
    x = _heavy((200_000,), 0)
    for values in (x, x.relu(), torch.ones(100_000)):
        few, weights = thin(values, 1 << 12)
        assert few.numel() <= 1 << 12
        assert float(weights.double().sum()) == pytest.approx(values.numel(), rel=1e-5)
        assert float(few.min()) == float(values.min())
        assert float(few.max()) == float(values.max())
        again, _ = thin(values, 1 << 12)
        assert torch.equal(few, again)
    few, weights = thin(x, 1 << 14)
    cubes = float((few.abs().pow(3) * weights).double().sum())
    assert cubes == pytest.approx(float(x.abs().pow(3).double().sum()), rel=0.02)


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="symmetric grid"):
        weight_scale(torch.ones(2, 2), Grid(4, False), PerTensor())
    with pytest.raises(ValueError, match="only finite"):
        weight_scale(torch.tensor([[1.0, float("nan")]]), Grid(4, True), PerTensor())
    with pytest.raises(ValueError, match="at least one value"):
        activation_range(torch.zeros(0), Grid(8, False))
    with pytest.raises(ValueError, match="steps must be"):
        activation_range(torch.ones(3), Grid(8, False), steps=0)


# One scale for each head and channel of (B, H, S, D).


@PROPERTY
@given(
    seed=st.integers(0, 999),
    bits=st.sampled_from([4, 8]),
    p=st.sampled_from([2.0, 3.0, 4.0]),
    outlier=st.booleans(),
)
def test_channel_scales_are_never_worse_than_one_for_all(
    seed: int, bits: int, p: float, outlier: bool
) -> None:
    """In no channel, so that neither in the sum over all that the search of one minimises."""
    x = _heavy((2, 3, 40, 4), seed)
    if outlier:
        x[0, 1, 5, 2] = 1000.0
    grid = Grid(bits, True)
    found, (common, _) = channel_scale(x, grid, p), activation_range(x, grid, p)
    assert (found.shape, found.dtype) == ((1, 3, 1, 4), torch.float32)
    own, one = (
        (fake_quantize(x, s, None, grid) - x).abs().pow(p).sum((0, 2)) for s in (found, common)
    )
    assert bool((own <= one * ROUNDING).all())
    assert float(own.sum()) < float(one.sum())


def test_each_channel_has_the_scale_of_its_own_samples() -> None:
    x = _heavy((2, 3, 40, 4), 1)
    grid = Grid(4, True)
    found = channel_scale(x, grid, 2.0)
    other = x.clone()
    other[:, 1, :, 2] *= 8  # a power of two: the same search on the same codes
    moved = channel_scale(other, grid, 2.0)
    expected = found.clone()
    expected[0, 1, 0, 2] *= 8
    torch.testing.assert_close(moved, expected)
    assert float(channel_scale(torch.zeros(1, 1, 3, 1), grid)) == 1.0


def test_channel_scales_refuse_what_ranges_refuse() -> None:
    with pytest.raises(ValueError, match="only finite ones"):
        channel_scale(torch.full((1, 1, 2, 1), float("inf")), Grid(4, True))
    with pytest.raises(ValueError, match="symmetric grid"):
        channel_scale(torch.ones(1, 1, 2, 1), Grid(4, False))
