"""Composite operators of a model with a KV cache, beside those of `graph.ops`.

    positions         attention mask (B, T), ids (B, S)            -> (B, S) int64
    cached_attention  q (B, S, H·D), k v (B, S, H_kv·D), past      -> (B, S, H·D), present k, v
                      or all three side by side in q
    stored            keys or values (B, H_kv, S, D), scale        -> what a cache gives back

A cache holds keys after RoPE: float (B, H_kv, P, D), codes in INT8 of the same shape, or 4-bit
codes plus 8, two in a UINT8 along D, the even channel in the low half. That is what
com.microsoft.GroupQueryAttention holds. Quantised caches have static symmetric scales, for keys
and for values either one, (1, 1, 1, 1), or one for each head and channel, (1, H_kv, 1, D).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fptq_compiler.graph.ops import attention_reference
from fptq_compiler.quant.grid import Grid, quantize
from fptq_compiler.quant.pairs import pack_pairs, unpack_pairs

CACHE_DTYPES = {16: torch.float32, 8: torch.int8, 4: torch.uint8}


def _positions(mask: Tensor, ids: Tensor) -> Tensor:
    """How many tokens stand before each of the last S: padding does not count."""
    counted = mask.long().cumsum(1) - 1
    return counted.clamp_min(0)[:, mask.shape[1] - ids.shape[1] :]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the first R channels of (B, S, H, D) by the angles of (B, S, R / 2)."""
    width = 2 * cos.shape[-1]
    cos, sin = cos.unsqueeze(2).to(x.dtype), sin.unsqueeze(2).to(x.dtype)
    turned, rest = x[..., :width], x[..., width:]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        pair = torch.stack((a * cos - b * sin, b * cos + a * sin), -1)
        return torch.cat((pair.flatten(-2), rest), -1)
    a, b = turned.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)


def rotate_at(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool
) -> Tensor:
    """Rotate (B, S, H, D) by tables (L, R / 2) of angles at positions (B, S)."""
    return rotate(x, cos[positions], sin[positions], interleaved)


def encode(x: Tensor, scale: Tensor | None, bits: int) -> Tensor:
    """Codes of keys or values (B, H_kv, S, D) as the cache holds them; float without a scale."""
    if scale is None:
        return x
    codes = quantize(x, scale, None, Grid(bits, symmetric=True)).to(torch.int8)
    return codes if bits == 8 else pack_pairs(codes)


def decode(cache: Tensor, scale: Tensor | None, bits: int, dtype: torch.dtype) -> Tensor:
    """The values (B, H_kv, T, D) that a cache stands for."""
    if scale is None:
        return cache
    codes = cache if bits == 8 else unpack_pairs(cache)
    return codes.to(dtype) * scale.to(dtype)


def _stored(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    return decode(encode(x, scale, bits), scale, bits, x.dtype)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, S, H·D) as (B, S, H, D)."""
    return x.reshape(*x.shape[:2], heads, -1)


@dataclass(frozen=True)
class CachedAttention:
    """The arguments of `fptq.cached_attention`, and what follows from them."""

    q: Tensor
    k: Tensor | None
    v: Tensor | None
    past_key: Tensor
    past_value: Tensor
    mask: Tensor
    positions: Tensor
    cos: Tensor | None
    sin: Tensor | None
    interleaved: bool
    heads: int
    kv_heads: int
    scale: float
    bits: int
    key_scale: Tensor | None
    value_scale: Tensor | None
    softcap: float = 0.0
    window: int = 0

    def projections(self) -> tuple[Tensor, Tensor, Tensor]:
        """Q (B, S, H, D), k and v (B, S, H_kv, D), taken apart where q holds all three."""
        if self.k is not None and self.v is not None:
            return (
                split_heads(self.q, self.heads),
                split_heads(self.k, self.kv_heads),
                split_heads(self.v, self.kv_heads),
            )
        all_heads = split_heads(self.q, self.heads + 2 * self.kv_heads)
        counts = [self.heads, self.kv_heads, self.kv_heads]
        q, k, v = torch.split(all_heads, counts, 2)
        return q, k, v

    def new_values(self) -> tuple[Tensor, Tensor]:
        """Keys, rotated, and values of this run, each (B, H_kv, S, D), before they are stored."""
        _, k, v = self.projections()
        return self._rotated(k).transpose(1, 2), v.transpose(1, 2)

    def present(self) -> tuple[Tensor, Tensor]:
        """What the cache holds after this run."""
        key, value = self.new_values()
        return (
            torch.cat((self.past_key, encode(key, self.key_scale, self.bits)), 2),
            torch.cat((self.past_value, encode(value, self.value_scale, self.bits)), 2),
        )

    def attend(self, present_key: Tensor, present_value: Tensor) -> Tensor:
        """(B, S, H·D) from all that is stored."""
        q = self._rotated(self.projections()[0]).transpose(1, 2)
        mixed = attention_reference(
            q,
            decode(present_key, self.key_scale, self.bits, q.dtype),
            decode(present_value, self.value_scale, self.bits, q.dtype),
            visible(self.mask, q.shape[2], self.window),
            False,
            self.scale,
            self.softcap,
        )
        return mixed.transpose(1, 2).flatten(2)

    def _rotated(self, x: Tensor) -> Tensor:
        if self.cos is None or self.sin is None:
            return x
        return rotate_at(x, self.cos, self.sin, self.positions, self.interleaved)


def _cached_attention(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate, store, and attend to all that is stored."""
    found = CachedAttention(*arguments)
    present = found.present()
    return (found.attend(*present), *present)


def visible(mask: Tensor, queries: int, window: int = 0) -> Tensor:
    """(B, 1, S, T) booleans: keys that are tokens, not of the future, and in the window.

    A query always sees itself, so that the row of a padding token is not empty. Padding does not
    count in the window.
    """
    keys = mask.shape[1]
    ones = torch.ones(queries, keys, dtype=torch.bool, device=mask.device)
    causal = ones.tril(keys - queries)
    itself = causal & ones.triu(keys - queries)
    seen = causal & (mask != 0)[:, None, None, :]
    if window:
        places = mask.long().cumsum(1) - 1
        behind = places[:, keys - queries :].clamp_min(0).unsqueeze(2) - places.unsqueeze(1)
        seen = seen & (behind < window).unsqueeze(1)
    return seen | itself


def _fake_cached_attention(
    q: Tensor, k: Tensor | None, v: Tensor | None, past_key: Tensor, past_value: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, kv_heads, past, width = past_key.shape
    shape = (batch, kv_heads, past + q.shape[1], width)
    heads = rest[5]
    channels = q.shape[2] if k is not None else q.shape[2] // (heads + 2 * kv_heads) * heads
    mixed = q.new_empty((*q.shape[:2], channels))
    return mixed, past_key.new_empty(shape), past_value.new_empty(shape)


_positions_op = torch.library.custom_op(
    "fptq::positions", _positions, mutates_args=(), schema="(Tensor mask, Tensor ids) -> Tensor"
)
_positions_op.register_fake(lambda mask, ids: torch.empty_like(ids))
_cached_attention_op = torch.library.custom_op(
    "fptq::cached_attention",
    _cached_attention,
    mutates_args=(),
    schema=(
        "(Tensor q, Tensor? k, Tensor? v, Tensor past_key, Tensor past_value, Tensor mask, "
        "Tensor positions, Tensor? cos, Tensor? sin, bool interleaved, int heads, int kv_heads, "
        "float scale, int bits, Tensor? key_scale, Tensor? value_scale, "
        "float softcap=0.0, int window=0) "
        "-> (Tensor, Tensor, Tensor)"
    ),
)
_cached_attention_op.register_fake(_fake_cached_attention)
_stored_op = torch.library.custom_op(
    "fptq::stored", _stored, mutates_args=(), schema="(Tensor x, Tensor scale, int bits) -> Tensor"
)
_stored_op.register_fake(lambda x, scale, bits: torch.empty_like(x))
positions = torch.ops.fptq.positions.default
stored = torch.ops.fptq.stored.default
cached_attention = torch.ops.fptq.cached_attention.default
