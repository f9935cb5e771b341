"""GPTQ: never worse than nearest rounding, and the codes of the paper's plain algorithm."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fptq_compiler.quant import (
    Granularity,
    Grid,
    PerBlock,
    PerChannel,
    fake_quantize,
    quantize,
    weight_scale,
)
from fptq_compiler.quant.gptq import COLUMNS, DAMPINGS, factor, gptq

PROPERTY = settings(deadline=None, derandomize=True, max_examples=40)
GRANULARITIES = st.sampled_from([PerChannel(0), PerBlock(1, 8), PerBlock(1, 32)])
GRIDS = st.sampled_from([Grid(2, symmetric=True), Grid(4, symmetric=True)])


class Case:
    """A weight in float64, correlated inputs (inputs, samples), some always 0, and a scale."""

    def __init__(
        self, seed: int, outputs: int, inputs: int, samples: int,
        granularity: Granularity, grid: Grid,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.W = random(outputs, inputs)
        widths = random(inputs, 1).exp() * (random(inputs, 1) > -1.0)
        self.X = widths * (random(inputs, inputs) @ random(inputs, samples))
        self.H = self.X @ self.X.t() * (2 / samples)
        self.granularity, self.grid = granularity, grid
        # clips a little, so that errors come from saturation too
        self.scale = 0.7 * weight_scale(self.W, grid, granularity).double()
        self.steps = granularity.expand(self.scale, self.W.shape)

    def rounded(self, W: Tensor, H: Tensor) -> Tensor:
        return gptq(W, H, self.scale.to(W.dtype), self.granularity, self.grid)

    def nearest(self, W: Tensor) -> Tensor:
        return fake_quantize(W, self.steps.to(W.dtype), None, self.grid)

    def errors(self, rounded: Tensor) -> Tensor:
        """What each output loses over the inputs: (outputs,)."""
        return ((self.W - rounded) @ self.X).square().sum(1)


CASES = st.builds(
    Case, st.integers(0, 9999), st.integers(1, 9), st.integers(1, 40), st.integers(1, 60),
    GRANULARITIES, GRIDS,
)


@PROPERTY
@given(CASES)
def test_no_output_is_worse_than_with_nearest_rounding(case: Case) -> None:
    nearest = case.errors(case.nearest(case.W))
    # sums in float64 in two orders, through H and through X
    assert bool((case.errors(case.rounded(case.W, case.H)) <= nearest * (1 + 1e-9) + 1e-9).all())


@PROPERTY
@given(CASES)
def test_values_lie_on_the_grid(case: Case) -> None:
    """Bit for bit, in float32: nearest rounding finds the codes again."""
    rounded = case.rounded(case.W.float(), case.H.float())
    codes = quantize(rounded, case.steps.float(), None, case.grid)
    assert torch.equal(codes * case.steps.float(), rounded)


@PROPERTY
@given(CASES)
def test_independent_inputs_are_rounded_to_the_nearest(case: Case) -> None:
    """In float32 and with any widths: H is diagonal, or 0."""
    W = case.W.float()
    for H in (torch.eye(W.shape[1]), case.H.float().diagonal().diag(), torch.zeros_like(case.H)):
        assert torch.equal(case.rounded(W, H), case.nearest(W))


def paper(case: Case) -> Tensor:
    """Algorithm 1 of the paper, one column at a time, with an explicit inverse in float64."""
    damped = case.H + DAMPINGS[0] * case.H.diagonal().mean() * torch.eye(len(case.H))
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    left, rounded, steps = case.W.clone(), case.W.clone(), case.steps.expand_as(case.W)
    for j in range(left.shape[1]):
        rounded[:, j] = fake_quantize(left[:, j], steps[:, j], None, case.grid)
        error = left[:, j] - rounded[:, j]
        left[:, j:] -= torch.outer(error / upper[j, j], upper[j, j:])
    return rounded


@pytest.mark.parametrize("granularity", [PerChannel(0), PerBlock(1, 32)])
def test_codes_are_those_of_the_paper(granularity: Granularity) -> None:
    """Over more columns than make up for each other one by one."""
    case = Case(0, 24, 2 * COLUMNS + 20, 900, granularity, Grid(4, symmetric=True))
    rounded, nearest = case.rounded(case.W, case.H), case.nearest(case.W)
    # the same codes; values are products in another order
    torch.testing.assert_close(rounded, paper(case), rtol=1e-14, atol=0)
    assert 0.1 < (rounded != nearest).double().mean() < 0.9
    assert case.errors(nearest).sum() > 1.3 * case.errors(rounded).sum()


def test_codes_do_not_depend_on_how_many_rows_go_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = Case(1, 24, 40, 300, PerBlock(1, 32), Grid(4, symmetric=True))
    whole = case.rounded(case.W, case.H)
    monkeypatch.setattr("fptq_compiler.quant.gptq.CHUNK", 7 * 40)
    assert torch.equal(case.rounded(case.W, case.H), whole)


def test_float32_gives_nearly_all_codes_of_float64() -> None:
    case = Case(2, 64, 200, 900, PerChannel(0), Grid(4, symmetric=True))
    exact = case.rounded(case.W, case.H)
    single = case.rounded(case.W.float(), case.H.float())
    assert single.dtype == torch.float32
    # a near tie that falls to the other side moves the columns behind it, in that row alone
    apart = (single / case.steps.float()).round() != (exact / case.steps).round()
    assert apart.any(1).double().mean() < 0.1


def test_damping_rises_until_h_can_be_factored() -> None:
    H = torch.eye(4)
    H[0, 1] = H[1, 0] = 1.05  # least eigenvalue -0.05
    R = factor(H)
    damped = H.double() + DAMPINGS[1] * torch.eye(4, dtype=torch.float64)
    assert torch.equal(R, R.triu())
    torch.testing.assert_close(R @ R.t(), damped, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("H", "message"),
    [
        (torch.tensor([[1.0, 5.0], [5.0, 1.0]]), "not positive definite, even with 1 times"),
        (torch.tensor([[1.0, torch.nan], [torch.nan, 1.0]]), "must be square and finite"),
        (torch.eye(3)[:2], r"must be square and finite, got shape \(2, 3\)"),
        (torch.eye(3), r"H must have shape \(in, in\) of W \(5, 2\), got \(3, 3\)"),
    ],
)
def test_what_is_no_hessian_is_refused(H: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gptq(torch.ones(5, 2), H, torch.ones(5), PerChannel(0), Grid(4, symmetric=True))
