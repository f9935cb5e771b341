"""T_k leaves every attention logit alone, and its plausible near misses do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fptq_compiler.transforms import RopePairs

TOKENS, KV_HEADS, GROUP, HEAD_DIM = 6, 2, 3, 16
EXACT = 1e-12
WRONG = 1e-2  # a wrong map is off by about one, see fptquant.md; far above any rounding


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _layout(name: str) -> tuple[Tensor, Tensor]:
    """(pairs, passthrough) of a head."""
    rotary = HEAD_DIM // 2 if name.startswith("partial") else HEAD_DIM
    index = torch.arange(rotary // 2)
    if name.endswith("half-split"):
        pairs = torch.stack([index, index + rotary // 2], dim=1)
    else:
        pairs = torch.stack([2 * index, 2 * index + 1], dim=1)
    return pairs, torch.arange(rotary, HEAD_DIM)


def _rope(x: Tensor, pairs: Tensor) -> Tensor:
    """RoPE on (tokens, heads, head_dim), pair i at frequency 10000^(-i / P)."""
    frequency = 10000.0 ** (-torch.arange(len(pairs), dtype=torch.float64) / len(pairs))
    angle = torch.outer(torch.arange(TOKENS, dtype=torch.float64), frequency)[:, None]
    first, second = x[..., pairs[:, 0]], x[..., pairs[:, 1]]
    y = x.clone()
    y[..., pairs[:, 0]] = first * angle.cos() - second * angle.sin()
    y[..., pairs[:, 1]] = first * angle.sin() + second * angle.cos()
    return y


def _logits(q: Tensor, k: Tensor, pairs: Tensor) -> Tensor:
    queries = _rope(q.view(TOKENS, KV_HEADS * GROUP, HEAD_DIM), pairs)
    keys = _rope(k.view(TOKENS, KV_HEADS, HEAD_DIM), pairs).repeat_interleave(GROUP, dim=1)
    return torch.einsum("mhd,nhd->hmn", queries, keys)


def _activations() -> tuple[Tensor, Tensor]:
    q = torch.randn(
        TOKENS, KV_HEADS * GROUP * HEAD_DIM, dtype=torch.float64, generator=_generator(1)
    )
    k = torch.randn(TOKENS, KV_HEADS * HEAD_DIM, dtype=torch.float64, generator=_generator(2))
    return q, k


def _error(q: Tensor, k: Tensor, pairs: Tensor, reference: Tensor) -> float:
    return float((_logits(q, k, pairs) - reference).norm() / reference.norm())


def _map(layout: str) -> RopePairs:
    map = RopePairs(*_layout(layout), KV_HEADS, HEAD_DIM)
    map.randomize_(_generator(3), 0.7)
    return map.requires_grad_(False)


LAYOUTS = ["half-split", "interleaved", "partial half-split", "partial interleaved"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_commutes_with_rope_and_keeps_logits(layout: str) -> None:
    pairs, _ = _layout(layout)
    map = _map(layout)
    q, k = _activations()
    heads = (TOKENS, KV_HEADS, HEAD_DIM)
    turned = map.right(_rope(k.view(heads), pairs).view(k.shape))
    rotated = _rope(map.right(k).view(heads), pairs).view(k.shape)
    torch.testing.assert_close(turned, rotated, rtol=EXACT, atol=EXACT)
    reference = _logits(q, k, pairs)
    moved_q = map.right_inverse_transpose(q, repeat=GROUP)
    assert float((moved_q - q).norm() / q.norm()) > WRONG
    assert _error(moved_q, map.right(k), pairs, reference) < EXACT


@pytest.mark.parametrize("layout", LAYOUTS)
def test_wrong_pair_layout_changes_logits(layout: str) -> None:
    swapped = {
        "half-split": "interleaved",
        "interleaved": "half-split",
        "partial half-split": "partial interleaved",
        "partial interleaved": "partial half-split",
    }
    pairs, _ = _layout(layout)
    map = _map(swapped[layout])
    q, k = _activations()
    moved_q = map.right_inverse_transpose(q, repeat=GROUP)
    assert _error(moved_q, map.right(k), pairs, _logits(q, k, pairs)) > WRONG


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scale_not_tied_inside_a_pair_changes_logits(layout: str) -> None:
    pairs, _ = _layout(layout)
    q, k = _activations()
    scale = torch.ones(HEAD_DIM, dtype=torch.float64)
    scale[pairs[:, 0]] = 2.0
    moved_k = (k.view(TOKENS, -1, HEAD_DIM) * scale).reshape(k.shape)
    moved_q = (q.view(TOKENS, -1, HEAD_DIM) / scale).reshape(q.shape)
    assert _error(moved_q, moved_k, pairs, _logits(q, k, pairs)) > WRONG


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reflection_changes_logits(layout: str) -> None:
    pairs, _ = _layout(layout)
    q, k = _activations()
    sign = torch.ones(HEAD_DIM, dtype=torch.float64)
    sign[pairs[:, 1]] = -1.0  # its own inverse transpose
    moved_k = (k.view(TOKENS, -1, HEAD_DIM) * sign).reshape(k.shape)
    moved_q = (q.view(TOKENS, -1, HEAD_DIM) * sign).reshape(q.shape)
    assert _error(moved_q, moved_k, pairs, _logits(q, k, pairs)) > WRONG


def test_same_transform_on_both_sides_changes_logits() -> None:
    pairs, _ = _layout("half-split")
    map = _map("half-split")
    q, k = _activations()
    moved_q = map.right(q, repeat=GROUP)
    assert _error(moved_q, map.right(k), pairs, _logits(q, k, pairs)) > WRONG


def test_channels_must_be_named_once() -> None:
    with pytest.raises(ValueError, match="each of the 4 channels once"):
        RopePairs(torch.tensor([[0, 1]]), torch.tensor([1, 2]), 1, 4)
    with pytest.raises(ValueError, match="each of the 4 channels once"):
        RopePairs(torch.tensor([[0, 2]]), torch.tensor([], dtype=torch.int64), 1, 4)
