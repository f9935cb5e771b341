"""Attention by PyTorch's fused kernel, which keeps no scores and needs no second forward pass."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fptq_compiler.graph import ops


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float,
    softcap: float = 0.0, window: int = 0,
) -> Tensor:
    """`fptq.attention`, up to the rounding of its dtype; where no fused kernel is, that operator.

    Args:
        q: (B, H, S, D).
        k: (B, G, T, D), where G divides H.
        v: (B, G, T, E).
        mask: what else hides or adds, see `fptq.attention`.
        causal: whether a query sees no key behind it.
        scale: of the scores.
        softcap: 0 caps nothing.
        window: 0 is no window.

    Returns:
        (B, H, S, E).
    """
    behind_past = causal and q.shape[2] != k.shape[2]
    if mask is not None or softcap or window or behind_past:
        found: Tensor = ops.attention(q, k, v, mask, causal, scale, softcap, window)
        return found
    return scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)
