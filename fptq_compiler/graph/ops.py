"""The composite operators: one spelling for what the passes recognise.

Each is a torch.library operator with a reference kernel, a fake kernel (shape and type alone, for
tracing) and a backward that recomputes the reference. Later passes and every lowering target
see these and not the dozen spellings that stand in exported models.

    sum_of_squares  x (..., d)                                     -> (..., 1)
    unit_rms        x (..., d)                                     -> (..., d), (..., 1)
    rms_norm        x (..., d), gain (d,) or None                 -> (..., d)
    attention       q (B, H, S, D), k v (B, H_kv, T, D), mask      -> (B, H, S, D)
                    (causal; window 0: all keys before; softcap 0: scores are not capped)
    fake_quantize   x any shape, scalar scale and zero-point       -> x's shape
                    (role: "linear input", "head input", "key" or "value", for the target)
    linear          x (..., K), integer codes (K, N), scale        -> (..., N)
    embedding       ids (...), integer codes (V, d), scale (V,)    -> (..., d)
                    (INT4 codes two to a byte, UINT8 (V, d / 2))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fptq_compiler.quant.grid import Grid
from fptq_compiler.quant.grid import fake_quantize as fake_quantize_on_grid
from fptq_compiler.quant.pairs import unpack_pairs


def wide(x: Tensor) -> Tensor:
    """`x` in at least float32: half types compute their statistics there, as models do."""
    return x.to(_wide_type(x))


def _wide_type(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _rms_norm(x: Tensor, gain: Tensor | None, epsilon: float) -> Tensor:
    statistics = wide(x)
    inverse = torch.rsqrt(statistics.square().mean(-1, keepdim=True) + epsilon)
    normalized = (statistics * inverse).to(x.dtype)
    return normalized if gain is None else normalized * gain


def _sum_of_squares(x: Tensor) -> Tensor:
    return wide(x).square().sum(-1, keepdim=True)


def _unit_rms(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` over its root mean square, and one over that."""
    statistics = wide(x)
    inverse = torch.rsqrt(statistics.square().mean(-1, keepdim=True))
    return (statistics * inverse).to(x.dtype), inverse.to(x.dtype)


def causal_mask(queries: int, keys: int, device: torch.device, window: int = 0) -> Tensor:
    """(S, T) booleans, True where query s may see key t.

    The last query sees the last key. With a window a query sees that many keys at most: itself
    and those right before it.
    """
    past = keys - queries
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(past)
    return seen.triu(past - window + 1) if window else seen


def soft_cap(scores: Tensor, cap: float) -> Tensor:
    """Cap * tanh(scores / cap), which stays below the cap; 0 caps nothing."""
    return cap * torch.tanh(scores / cap) if cap else scores


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float,
    softcap: float = 0.0, window: int = 0,
) -> Tensor:
    """The reference of `fptq.attention`: scores and sums in the dtype of q, softmax in float32.

    Scores are capped before anything is hidden. The window belongs to `causal`.
    """
    batch, heads, queries, width = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, queries, width)
    scores = torch.matmul(grouped * scale, k.unsqueeze(2).transpose(-1, -2))
    scores = soft_cap(scores, softcap)
    if causal:
        hidden = causal_mask(queries, keys, q.device, window).logical_not()
        scores = scores.masked_fill(hidden, float("-inf"))
    if mask is not None:
        grouped_mask = mask.unsqueeze(2) if mask.dim() == 4 else mask
        if mask.dim() == 4 and mask.shape[1] != 1:
            grouped_mask = mask.reshape(
                mask.shape[0], kv_heads, heads // kv_heads, mask.shape[2], mask.shape[3]
            )
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(grouped_mask.logical_not(), float("-inf"))
        else:
            scores = scores + grouped_mask
    weights = torch.softmax(wide(scores), -1).to(q.dtype)
    mixed = torch.matmul(weights, v.unsqueeze(2))
    return mixed.reshape(batch, heads, queries, v.shape[-1])


def _fake_quantize(x: Tensor, scale: float, zero_point: int, bits: int, role: str) -> Tensor:
    step = torch.tensor(scale, dtype=torch.float32, device=x.device)
    zero = torch.tensor(float(zero_point), dtype=torch.float32, device=x.device)
    return fake_quantize_on_grid(x, step, zero, Grid(bits, symmetric=False))


def dequantize_weight(codes: Tensor, scale: Tensor, dtype: torch.dtype, block: int) -> Tensor:
    """Codes (K, N) times scale: (N,) per channel, or (ceil(K / block), N) per block of K."""
    values = codes.to(dtype)
    if not block:
        return values.mul_(scale.to(dtype))
    return values.mul_(scale.to(dtype).repeat_interleave(block, 0)[: codes.shape[0]])


def _linear(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, bits: int, block: int
) -> Tensor:
    y = torch.matmul(x, dequantize_weight(codes, scale, x.dtype, block))
    return y if bias is None else y + bias


def _embedding(ids: Tensor, codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    rows = unpack_pairs(codes[ids]) if bits == 4 else codes[ids]
    return rows.to(scale.dtype) * scale[ids].unsqueeze(-1)


def _fake_sum_of_squares(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], 1), dtype=_wide_type(x))


def _fake_unit_rms(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1))


def _fake_rms_norm(x: Tensor, gain: Tensor | None, epsilon: float) -> Tensor:
    dtype = x.dtype if gain is None else torch.promote_types(x.dtype, gain.dtype)
    return torch.empty_like(x, dtype=dtype)


def _fake_attention(q: Tensor, k: Tensor, v: Tensor, *settings: Any) -> Tensor:
    return q.new_empty((*q.shape[:3], v.shape[3]))


def _fake_fake_quantize(x: Tensor, *settings: Any) -> Tensor:
    return torch.empty_like(x)


def _fake_linear(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, bits: int, block: int
) -> Tensor:
    dtype = x.dtype if bias is None else torch.promote_types(x.dtype, bias.dtype)
    return x.new_empty((*x.shape[:-1], codes.shape[1]), dtype=dtype)


def _fake_embedding(ids: Tensor, codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    width = 2 * codes.shape[1] if bits == 4 else codes.shape[1]
    return scale.new_empty((*ids.shape, width))


def _define(
    name: str, schema: str, reference: Callable[..., Tensor], fake: Callable[..., Tensor]
) -> Any:
    """Register `reference` under fptq::name, differentiable by recomputing it."""
    operator = torch.library.custom_op(f"fptq::{name}", reference, mutates_args=(), schema=schema)
    operator.register_fake(fake)

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*[x for x in inputs if isinstance(x, Tensor)])
        ctx.rest = [None if isinstance(x, Tensor) else (x,) for x in inputs]

    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)
        arguments = [next(saved) if rest is None else rest[0] for rest in ctx.rest]
        leaves = [
            x.detach().requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else x
            for x in arguments
        ]
        wanted = [
            i
            for i, x in enumerate(leaves)
            if isinstance(x, Tensor) and x.requires_grad and ctx.needs_input_grad[i]
        ]
        with torch.enable_grad():
            output = reference(*leaves)
        found = torch.autograd.grad(output, [leaves[i] for i in wanted], gradient)
        gradients: list[Any] = [None] * len(leaves)
        for i, value in zip(wanted, found, strict=True):
            gradients[i] = value
        return tuple(gradients)

    operator.register_autograd(backward, setup_context=save)
    return getattr(torch.ops.fptq, name).default


sum_of_squares = _define(
    "sum_of_squares", "(Tensor x) -> Tensor", _sum_of_squares, _fake_sum_of_squares
)
rms_norm = _define(
    "rms_norm", "(Tensor x, Tensor? gain, float epsilon) -> Tensor", _rms_norm, _fake_rms_norm
)
attention = _define(
    "attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float scale, "
    "float softcap=0.0, int window=0) -> Tensor",
    attention_reference,
    _fake_attention,
)
fake_quantize = _define(
    "fake_quantize",
    "(Tensor x, float scale, int zero_point, int bits, str role) -> Tensor",
    _fake_quantize,
    _fake_fake_quantize,
)
linear = _define(
    "linear",
    "(Tensor x, Tensor codes, Tensor scale, Tensor? bias, int bits, int block) -> Tensor",
    _linear,
    _fake_linear,
)
embedding = _define(
    "embedding",
    "(Tensor ids, Tensor codes, Tensor scale, int bits) -> Tensor",
    _embedding,
    _fake_embedding,
)
_unit_rms_op = torch.library.custom_op(
    "fptq::unit_rms", _unit_rms, mutates_args=(), schema="(Tensor x) -> (Tensor, Tensor)"
)
_unit_rms_op.register_fake(_fake_unit_rms)
unit_rms = torch.ops.fptq.unit_rms.default
