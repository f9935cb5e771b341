"""Scales and zero-points: the clip that loses least in an L_p norm, and min-max as a baseline.

arXiv 2506.04985 initialises every range by minimising ||x - x̂||_p over a grid of clips. Searches
run in float32 on the quantiser's own arithmetic (true division, ties to even).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from fptq_compiler.quant.granularity import Granularity, PerBlock, PerChannel, PerTensor
from fptq_compiler.quant.grid import Grid
from fptq_compiler.quant.samples import thin

CHUNK = 1 << 17
"""Weights searched at once: the working set stays in the cache."""
COARSE = 4
"""The first search of weights looks at every fourth clip, the second around the best."""
NARROWEST = 1 / 256
"""The tightest clip of activations, as a fraction of the extreme value."""


def minmax_scale(W: Tensor, grid: Grid, granularity: Granularity) -> Tensor:
    """The scale that takes the largest magnitude to the highest code: nothing is clipped.

    Args:
        W: any shape, floating and finite.
        grid: symmetric.
        granularity: which values share a scale.

    Returns:
        float32 of `granularity.scale_shape`, positive; 1 where all values are zero.

    Raises:
        ValueError: the grid is not symmetric, W is empty or not finite.
    """
    groups = _groups(W, grid, granularity)
    return _widest(groups, grid).reshape(granularity.scale_shape(W.shape))


def weight_scale(
    W: Tensor, grid: Grid, granularity: Granularity, p: float = 2.4, steps: int = 80
) -> Tensor:
    """The scale that minimises ||W - fq(W)||_p over clips k / steps of the largest magnitude.

    Coarse to fine: every fourth clip, then the three on either side of the best. The unclipped
    range is among them, so the result is never worse than `minmax_scale`.

    Args:
        W: any shape, floating and finite.
        grid: symmetric.
        granularity: which values share a scale.
        p: the norm; a larger one protects outliers more.
        steps: resolution of the clip.

    Returns:
        float32 of `granularity.scale_shape`, positive; 1 where all values are zero.

    Raises:
        ValueError: the grid is not symmetric, W is empty or not finite, or steps < 1.
    """
    _check_steps(steps)
    groups = _groups(W, grid, granularity)
    rows = max(1, CHUNK // groups.shape[1])
    scales = [_search_rows(chunk, grid, p, steps) for chunk in torch.split(groups, rows)]
    return torch.cat(scales).reshape(granularity.scale_shape(W.shape))


def minmax_range(samples: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The range from the least to the largest sample, widened to contain 0.

    Args:
        samples: any shape, floating and finite.
        grid: symmetric or not.

    Returns:
        (scale, zero_point), float32 of shape (); the zero-point is integer-valued in the grid.

    Raises:
        ValueError: there is no sample, or one is not finite.
    """
    flat = _flat(samples)
    return _affine(*_extremes(flat), grid)


def activation_range(
    samples: Tensor, grid: Grid, p: float = 3, steps: int = 24
) -> tuple[Tensor, Tensor]:
    """One static range for all samples that minimises ||x - x̂||_p.

    Low and high clip are searched independently: all pairs of `steps` geometric fractions of the
    two extremes on a few samples, then each side in turn with shrinking steps on up to 2^18.
    Extremes are always kept (see `samples.thin`). The range contains 0 and is never worse than
    `minmax_range` on all samples.

    Args:
        samples: any shape, floating and finite.
        grid: symmetric (then both clips are tied) or not.
        p: the norm; 2 to 4.
        steps: clips tried on each side in the first search.

    Returns:
        (scale, zero_point), float32 of shape (); the zero-point is integer-valued in the grid.

    Raises:
        ValueError: there is no sample, one is not finite, or steps < 1.
    """
    _check_steps(steps)
    flat = _flat(samples)
    low, high = _extremes(flat)
    if grid.symmetric:
        high = max(-low, high)
        low = -high
    if high == low:
        return _affine(low, high, grid)
    few = thin(flat, 1 << 13)
    ratio = NARROWEST ** (1 / max(steps - 1, 1))
    fractions = [ratio**index for index in range(steps)]
    pairs = [
        (low_clip, high_clip)
        for low_clip in (fractions if low < 0 else [1.0])
        for high_clip in (fractions if high > 0 else [1.0])
        if not grid.symmetric or low_clip == high_clip
    ]
    clips = min(pairs, key=lambda pair: _loss(*few, low * pair[0], high * pair[1], grid, p))
    clips = _refine(thin(flat, 1 << 18), (low, high), clips, grid, p, ratio)
    every = (flat, torch.ones(()))
    if _loss(*every, low, high, grid, p) < _loss(*every, low * clips[0], high * clips[1], grid, p):
        clips = (1.0, 1.0)
    return _affine(low * clips[0], high * clips[1], grid)


def channel_scale(samples: Tensor, grid: Grid, p: float = 3) -> Tensor:
    """One static scale for each head and channel, each minimising ||x - x̂||_p of its own.

    None is worse on the samples than the one scale that `activation_range` gives for all.

    Args:
        samples: (B, H, S, D), floating and finite.
        grid: symmetric.
        p: the norm; 2 to 4.

    Returns:
        (1, H, 1, D) float32, positive; 1 where all samples of a channel are zero.

    Raises:
        ValueError: the grid is not symmetric, there is no sample, or one is not finite.
    """
    _, heads, _, width = samples.shape
    channels = samples.detach().to(torch.float32).permute(1, 3, 0, 2).reshape(heads * width, -1)
    own = weight_scale(channels, grid, PerChannel(0), p)[:, None]
    common = activation_range(channels, grid, p)[0].to(own.device).expand_as(own)
    buffer = torch.empty_like(channels)
    own_loss, common_loss = (_row_loss(channels, s, grid, p, buffer) for s in (own, common))
    return torch.where(own_loss <= common_loss, own, common).reshape(1, heads, 1, width)


def _refine(
    samples: tuple[Tensor, Tensor],
    extremes: tuple[float, float],
    clips: tuple[float, float],
    grid: Grid,
    p: float,
    ratio: float,
) -> tuple[float, float]:
    """Coordinate descent from `clips`, each round with the square root of the last step."""
    low, high = extremes
    least = _loss(*samples, low * clips[0], high * clips[1], grid, p)
    for halving in (1, 2, 3):
        step = ratio ** (0.5**halving)
        for side in (1, 0):
            centre = clips
            for factor in (step, 1 / step):
                moved = [
                    min(centre[index] * factor, 1.0)
                    if index == side or grid.symmetric
                    else centre[index]
                    for index in (0, 1)
                ]
                loss = _loss(*samples, low * moved[0], high * moved[1], grid, p)
                if loss < least:
                    least, clips = loss, (moved[0], moved[1])
    return clips


def _loss(values: Tensor, weights: Tensor, low: float, high: float, grid: Grid, p: float) -> float:
    scale, zero_point = _affine(low, high, grid)
    total = 0.0
    weighted = weights.ndim > 0
    for start in range(0, values.numel(), CHUNK):
        part = values[start : start + CHUNK]
        codes = torch.div(part, scale.to(part.device)).round_().add_(zero_point.item())
        codes.clamp_(grid.lowest, grid.highest).sub_(zero_point.item()).mul_(scale.item())
        error = _power(codes.sub_(part), p)
        error = error.mul_(weights[start : start + CHUNK]) if weighted else error
        total += float(error.sum())
    return total


def _affine(low: float, high: float, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero-point of [low, high], low <= 0 <= high, computed in double precision."""
    tiny = torch.finfo(torch.float32).tiny
    if grid.symmetric:
        scale = max(-low, high) / grid.highest
    else:
        scale = (high - low) / (grid.highest - grid.lowest)
    if scale < tiny:
        return torch.tensor(1.0), torch.tensor(0.0)
    zero_point = 0 if grid.symmetric else grid.lowest + round(-low / scale)
    clamped = min(max(zero_point, grid.lowest), grid.highest)
    return torch.tensor(scale, dtype=torch.float32), torch.tensor(float(clamped))


def _search_rows(groups: Tensor, grid: Grid, p: float, steps: int) -> Tensor:
    """The best scale of each row of (groups, values) float32."""
    widest = _widest(groups, grid)[:, None]
    unit = widest / steps
    best = widest.clone()
    clip_best = torch.full_like(widest, steps)
    buffer = torch.empty_like(groups)
    least = _row_loss(groups, widest, grid, p, buffer)

    def attempt(clips: Tensor) -> None:
        scale = (unit * clips).clamp_min_(torch.finfo(torch.float32).tiny)
        loss = _row_loss(groups, scale, grid, p, buffer)
        better = loss < least
        least.copy_(torch.where(better, loss, least))
        best.copy_(torch.where(better, scale, best))
        clip_best.copy_(torch.where(better, clips, clip_best))

    for clip in range(steps - COARSE, 0, -COARSE):
        attempt(torch.full_like(widest, clip))
    centre = clip_best.clone()
    for offset in (*range(1 - COARSE, 0), *range(1, COARSE)):
        attempt((centre + offset).clamp_(1, steps))
    return best[:, 0]


def _row_loss(groups: Tensor, scale: Tensor, grid: Grid, p: float, buffer: Tensor) -> Tensor:
    torch.div(groups, scale, out=buffer)
    buffer.round_().clamp_(grid.lowest, grid.highest).mul_(scale).sub_(groups)
    return _power(buffer, p).sum(dim=1, keepdim=True)


def _power(error: Tensor, p: float) -> Tensor:
    """|error|^p in place, without a general power where p allows."""
    if p == 2:
        return error.square_()
    if p == 4:
        return error.square_().square_()
    error.abs_()
    return error.mul_(error.square()) if p == 3 else error.pow_(p)


def _widest(groups: Tensor, grid: Grid) -> Tensor:
    largest = groups.abs().amax(dim=1)
    scale = largest / grid.highest
    return torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)


def _groups(W: Tensor, grid: Grid, granularity: Granularity) -> Tensor:
    """(groups, values) float32 in the order of the scale, short blocks padded with zeros."""
    if not grid.symmetric:
        message = "weights are quantised on a symmetric grid"
        raise ValueError(message)
    values = _finite(W).to(torch.float32)
    if isinstance(granularity, PerTensor):
        return values.reshape(1, -1)
    granularity.scale_shape(W.shape)  # refuses an axis that does not exist
    if isinstance(granularity, PerBlock):
        last = values.movedim(granularity.axis, -1)
        missing = -last.shape[-1] % granularity.size
        padded = pad(last, (0, missing))
        blocks = padded.reshape(*last.shape[:-1], -1, granularity.size)
        axis = granularity.axis % W.ndim
        return blocks.movedim(-2, axis).reshape(-1, granularity.size)
    return values.movedim(granularity.axis, 0).reshape(W.shape[granularity.axis], -1)


def _flat(samples: Tensor) -> Tensor:
    return _finite(samples).to(torch.float32).reshape(-1)


def _finite(x: Tensor) -> Tensor:
    if x.numel() == 0 or not bool(torch.stack(torch.aminmax(x)).isfinite().all()):
        message = f"a range needs at least one value and only finite ones, shape {tuple(x.shape)}"
        raise ValueError(message)
    return x.detach()


def _extremes(flat: Tensor) -> tuple[float, float]:
    low, high = torch.aminmax(flat)
    return min(low.item(), 0.0), max(high.item(), 0.0)


def _check_steps(steps: int) -> None:
    if steps < 1:
        message = f"steps must be at least 1, got {steps}"
        raise ValueError(message)
