"""GPTQ (arXiv 2210.17323): round a weight column by column, each making up for those before it.

With the Hessian H = 2/n X Xᵀ of a linear's n calibration inputs X (in, n), the error of its output
is ‖(W - Ŵ) X‖² = n/2 Σ e H eᵀ over the rows e of W - Ŵ. Rounding column j to the nearest code of

    W_j + Σ_{i<j} (W - Ŵ)_i M_ij,  H = M D Mᵀ,  M unit upper triangular, D diagonal

is GPTQ: what the inverse of H and its Cholesky factor push into the columns to come is the same
sum (arXiv 2307.13304, theorem 6), without the inverse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fptq_compiler.quant.granularity import Granularity
from fptq_compiler.quant.grid import Grid, fake_quantize

COLUMNS = 128
"""Columns that make up for each other one by one; those before them come in by one matmul."""
DAMPINGS = (0.01, 0.1, 1.0)
"""Of the mean of H's diagonal, added to the diagonal: the first with which H can be factored."""
CHUNK = 1 << 23
"""Weights rounded at once."""


def gptq(W: Tensor, H: Tensor, scale: Tensor, granularity: Granularity, grid: Grid) -> Tensor:
    """W on the grid so that little of its outputs is lost.

    A row that nearest rounding serves better keeps it. So no row's error over the calibration
    inputs is larger than with nearest rounding.

    Args:
        W: (out, in), floating; float64 is computed in float64, all else in float32.
        H: (in, in), see `factor`.
        scale: positive, of `granularity.scale_shape`.
        granularity: which weights share a scale.
        grid: symmetric.

    Returns:
        Codes times scale in the shape and dtype of W: nearest rounding gives the same codes.

    Raises:
        ValueError: the shapes do not fit, or H is no Hessian.
    """
    return round_columns(W, factor(H), scale, granularity, grid)


def factor(H: Tensor) -> Tensor:
    """R (in, in) in float64, upper triangular, with R Rᵀ = H + damping · mean(diag H) · 1.

    Of a channel that is always 0 nothing is known: the damping alone stands on the diagonal and
    its weights are rounded to the nearest, as all are where H is 0.

    Raises:
        ValueError: H is not square and finite, or so far from positive definite that no damping
            helps.
    """
    if H.dim() != 2 or H.shape[0] != H.shape[1] or not bool(H.isfinite().all()):
        message = f"H must be square and finite, got shape {tuple(H.shape)}"
        raise ValueError(message)
    flipped = H.double().flip(0, 1)
    mean = float(flipped.diagonal().mean()) or 1.0
    for damping in DAMPINGS:
        damped = flipped.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper: Tensor = lower.flip(0, 1)
            return upper
    message = (
        f"H is not positive definite, even with {DAMPINGS[-1]:g} times the mean of its diagonal "
        f"({mean:.3g}) added to it; expected a sum of x xᵀ"
    )
    raise ValueError(message)


def round_columns(
    W: Tensor, R: Tensor, scale: Tensor, granularity: Granularity, grid: Grid
) -> Tensor:
    """`gptq` with the factor of H, which weights with the same input share."""
    if W.dim() != 2 or R.shape != (W.shape[1], W.shape[1]):
        message = f"H must have shape (in, in) of W {tuple(W.shape)}, got {tuple(R.shape)}"
        raise ValueError(message)
    dtype = torch.float64 if W.dtype == torch.float64 else torch.float32
    R = R.to(dtype)
    steps = granularity.expand(scale.to(dtype), W.shape).expand(W.shape)
    rows = max(1, CHUNK // W.shape[1])
    rounded = torch.empty_like(W)
    for start in range(0, W.shape[0], rows):
        part = slice(start, start + rows)
        rounded[part] = _round_rows(W[part].to(dtype), R, steps[part], grid)
    return rounded


def _round_rows(W: Tensor, R: Tensor, steps: Tensor, grid: Grid) -> Tensor:
    nearest = fake_quantize(W, steps, None, grid)
    fed = _feed_forward(W.t().contiguous(), R / R.diagonal(), steps.t(), grid).t()
    better = _loss(W - fed, R) < _loss(W - nearest, R)
    return torch.where(better[:, None], fed, nearest)


def _feed_forward(weights: Tensor, M: Tensor, steps: Tensor, grid: Grid) -> Tensor:
    """Round weights (in, out) row by row, each with the errors of those before."""
    errors, rounded = torch.empty_like(weights), torch.empty_like(weights)
    for start in range(0, len(weights), COLUMNS):
        stop = min(start + COLUMNS, len(weights))
        targets = weights[start:stop] + M[:start, start:stop].t() @ errors[:start]
        for row in range(start, stop):
            target = targets[row - start] + M[start:row, row] @ errors[start:row]
            rounded[row] = fake_quantize(target, steps[row], None, grid)
            errors[row] = weights[row] - rounded[row]
    return rounded


def _loss(errors: Tensor, R: Tensor) -> Tensor:
    """(rows,) e H eᵀ of each row e."""
    return (errors @ R).square().sum(1)
