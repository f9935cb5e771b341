"""One small decoder in many spellings.

Hugging Face models write the same decoder in dozens of ways: rotary embeddings by halves, by
pairs or as complex numbers; grouped keys expanded, repeated or left to the kernel; projections
packed or apart. `Toy` is one decoder whose `ToyConfig` chooses each spelling, so that a pass is
tested against all of them on a model that a reader can hold in mind.

Shapes: B batch, S sequence, H heads, K key-value heads, D head_dim, V vocabulary. Attention is
always causal. Parameters are named as in Hugging Face's Llama; the packed ones as in its Phi-3.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional

MAX_POSITIONS = 64
"""Length of the position tables, hence the largest exported sequence."""


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    """Sizes and spelling of a toy; the defaults are the plainest modern decoder."""

    vocabulary: int = 61
    hidden: int = 24
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    mlp: int = 40
    layers: int = 2
    epsilon: float = 1e-5
    rope: Literal["half", "interleaved", "complex", "partial", "none"] = "half"
    gqa: Literal["expand", "repeat_interleave", "enable_gqa"] = "expand"
    attention: Literal["sdpa", "eager"] = "sdpa"
    packed_qkv: Literal["none", "split", "slice", "chunk"] = "none"
    packed_gate_up: Literal["none", "chunk", "slice"] = "none"
    norm: Literal["op", "spelled", "spelled_mul", "one_plus"] = "op"
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    position_bias: bool = False
    """A learned bias on q for each position, before RoPE: q is then no linear map of the head."""
    value_readers: int = 1
    """2: the residual stream also reads v directly, so v cannot be transformed alone."""
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        """Raise ValueError for a combination that no spelling can express."""
        if self.heads % self.kv_heads:
            message = f"heads={self.heads} is no multiple of kv_heads={self.kv_heads}"
            raise ValueError(message)
        if self.head_dim % 4:
            message = f"head_dim={self.head_dim} is no multiple of 4: partial RoPE halves twice"
            raise ValueError(message)
        if self.packed_qkv == "chunk" and self.heads != self.kv_heads:
            message = "packed_qkv='chunk' needs parts of one size: heads == kv_heads"
            raise ValueError(message)
        if self.attention == "eager" and self.gqa == "enable_gqa":
            message = "enable_gqa is an argument of scaled_dot_product_attention, not of eager"
            raise ValueError(message)
        if self.value_readers not in (1, 2):
            message = f"value_readers={self.value_readers} is neither 1 nor 2"
            raise ValueError(message)

    @property
    def rotary_dim(self) -> int:
        """How many leading channels of a head rotate."""
        if self.rope == "none":
            return 0
        return self.head_dim // 2 if self.rope == "partial" else self.head_dim


class RMSNorm(nn.Module):
    """x / rms(x) * gain over the last axis, as the op or as Hugging Face spells it."""

    def __init__(self, config: ToyConfig, width: int) -> None:
        super().__init__()
        self.spelling, self.epsilon = config.norm, config.epsilon
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        if self.spelling == "op":
            return functional.rms_norm(x, (x.shape[-1],), self.weight, self.epsilon)
        wide = x.to(torch.float32)
        square = wide * wide if self.spelling == "spelled_mul" else wide.pow(2)
        wide = wide * torch.rsqrt(square.mean(-1, keepdim=True) + self.epsilon)
        if self.spelling == "one_plus":  # Gemma: gain 1 + w, applied before the cast back
            return (wide * (1.0 + self.weight.float())).type_as(x)
        return self.weight * wide.to(x.dtype)


class Rotary(nn.Module):
    """The tables that turn q and k by the angle of each position, shared by all layers."""

    frequencies: Tensor
    freqs_cis: Tensor

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.spelling, width = config.rope, config.rotary_dim
        if self.spelling == "none":
            return
        frequencies = 100.0 ** -(torch.arange(0, width, 2).float() / width)
        if self.spelling == "complex":
            angles = torch.outer(torch.arange(MAX_POSITIONS).float(), frequencies)
            freqs_cis = torch.polar(torch.ones_like(angles), angles)  # [positions, D/2] complex64
            self.register_buffer("freqs_cis", freqs_cis, persistent=False)
        else:
            self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the tables for x, [B, S, hidden]: none, (freqs_cis,) or (cosine, sine)."""
        if self.spelling == "none":
            return ()
        if self.spelling == "complex":
            return (self.freqs_cis[: x.shape[1]],)
        positions = torch.arange(x.shape[1], device=x.device)
        angles = positions[:, None].float() * self.frequencies[None, :]  # [S, D/2]
        if self.spelling != "interleaved":
            angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def rotate(x: Tensor, tables: tuple[Tensor, ...], config: ToyConfig) -> Tensor:
    """Apply RoPE to x, [B, H, S, D]."""
    match config.rope:
        case "none":
            return x
        case "half":
            return rotate_halves(x, *tables)
        case "interleaved":
            return rotate_pairs(x, *tables)
        case "complex":
            return rotate_complex(x, *tables)
        case "partial":
            turned = rotate_halves(x[..., : config.rotary_dim], *tables)
            return torch.cat((turned, x[..., config.rotary_dim :]), dim=-1)


def rotate_halves(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Llama in Hugging Face: channel i turns with channel i + D/2."""
    low, high = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return x * cosine + torch.cat((-high, low), dim=-1) * sine


def rotate_pairs(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """GPT-J: channel 2i turns with channel 2i + 1."""
    even, odd = x[..., 0::2], x[..., 1::2]
    pairs = (even * cosine - odd * sine, even * sine + odd * cosine)
    return torch.stack(pairs, dim=-1).flatten(-2)


def rotate_complex(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Meta's Llama: the pairs of `rotate_pairs` as complex numbers."""
    numbers = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(numbers * freqs_cis).flatten(-2).type_as(x)


class Attention(nn.Module):
    """Grouped-query attention with its four projections."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config, self.scale = config, config.head_dim**-0.5
        hidden, bias = config.hidden, config.attention_bias
        kv_width = config.kv_heads * config.head_dim
        self.widths = [config.heads * config.head_dim, kv_width, kv_width]
        if config.packed_qkv == "none":
            self.q_proj, self.k_proj, self.v_proj = (
                nn.Linear(hidden, width, bias=bias) for width in self.widths
            )
        else:
            self.qkv_proj = nn.Linear(hidden, sum(self.widths), bias=bias)
        self.o_proj = nn.Linear(self.widths[0], hidden, bias=config.output_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config, config.head_dim)
            self.k_norm = RMSNorm(config, config.head_dim)
        if config.position_bias:
            self.position_bias = nn.Parameter(torch.empty(MAX_POSITIONS, config.head_dim))

    def forward(self, x: Tensor, tables: tuple[Tensor, ...]) -> Tensor:
        """Attend; x is [B, S, hidden], tables are Rotary's."""
        config = self.config
        q, k, v = self.project(x)
        queries, keys, values = (
            part.view(*x.shape[:-1], -1, config.head_dim).transpose(1, 2) for part in (q, k, v)
        )
        if config.qk_norm:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        if config.position_bias:
            queries = queries + self.position_bias[: x.shape[1]]
        queries, keys = rotate(queries, tables, config), rotate(keys, tables, config)
        context = self.attend(queries, self.repeat(keys), self.repeat(values))
        output = cast(Tensor, self.o_proj(context.transpose(1, 2).flatten(2)))
        if config.value_readers == 2:
            output = output + v.mean(dim=-1, keepdim=True)
        return output

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q [B, S, H D], k and v [B, S, K D]."""
        packing = self.config.packed_qkv
        if packing == "none":
            return self.q_proj(x), self.k_proj(x), self.v_proj(x)
        qkv = self.qkv_proj(x)
        if packing == "split":
            q, k, v = qkv.split(self.widths, dim=-1)
        elif packing == "chunk":
            q, k, v = qkv.chunk(3, dim=-1)
        else:
            query_end, key_end = self.widths[0], self.widths[0] + self.widths[1]
            q, k, v = qkv[..., :query_end], qkv[..., query_end:key_end], qkv[..., key_end:]
        return q, k, v

    def repeat(self, x: Tensor) -> Tensor:
        """Repeat each key or value head for its group of queries: [B, K, S, D] to [B, H, S, D]."""
        group = self.config.heads // self.config.kv_heads
        if group == 1 or self.config.gqa == "enable_gqa":
            return x
        if self.config.gqa == "repeat_interleave":
            return x.repeat_interleave(group, dim=1)
        batch, kv_heads, length, head_dim = x.shape
        x = x[:, :, None, :, :].expand(batch, kv_heads, group, length, head_dim)
        return x.reshape(batch, kv_heads * group, length, head_dim)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal softmax(q kT scale) v, [B, H, S, D]."""
        if self.config.attention == "sdpa":
            return functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self.scale, enable_gqa=k.shape[1] != q.shape[1]
            )
        length = q.shape[-2]
        lowest = torch.finfo(q.dtype).min
        mask = torch.full((length, length), lowest, dtype=q.dtype, device=q.device).triu(1)
        scores = torch.matmul(q, k.transpose(2, 3)) * self.scale + mask
        weights = functional.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        return torch.matmul(weights, v)


class MLP(nn.Module):
    """The gated MLP: down(activation(gate(x)) * up(x))."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config, bias = config, config.mlp_bias
        if config.packed_gate_up == "none":
            self.gate_proj = nn.Linear(config.hidden, config.mlp, bias=bias)
            self.up_proj = nn.Linear(config.hidden, config.mlp, bias=bias)
        else:
            self.gate_up_proj = nn.Linear(config.hidden, 2 * config.mlp, bias=bias)
        self.down_proj = nn.Linear(config.mlp, config.hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.project(x)
        return cast(Tensor, self.down_proj(self.activate(gate) * up))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.packed_gate_up == "none":
            return self.gate_proj(x), self.up_proj(x)
        both = self.gate_up_proj(x)
        if self.config.packed_gate_up == "chunk":
            gate, up = both.chunk(2, dim=-1)
            return gate, up
        return both[..., : self.config.mlp], both[..., self.config.mlp :]

    def activate(self, x: Tensor) -> Tensor:
        match self.config.activation:
            case "silu":
                return functional.silu(x)
            case "gelu":
                return functional.gelu(x)
            case "gelu_tanh":
                return functional.gelu(x, approximate="tanh")
            case "relu":
                return functional.relu(x)


class Layer(nn.Module):
    """One pre-norm block."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config, config.hidden)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config, config.hidden)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, tables: tuple[Tensor, ...]) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), tables)
        return cast(Tensor, x + self.mlp(self.post_attention_layernorm(x)))


class Decoder(nn.Module):
    """Embedding, blocks and final norm: `model` in Hugging Face's names."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocabulary, config.hidden)
        self.rotary_emb = Rotary(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config, config.hidden)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids)
        tables = self.rotary_emb(x)
        for layer in self.layers:
            x = layer(x, tables)
        return cast(Tensor, self.norm(x))


class Toy(nn.Module):
    """The decoder and its head."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden, config.vocabulary, bias=False)
        if config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """Map input_ids, int64 [B, S], to logits [B, S, V]."""
        return cast(Tensor, self.lm_head(self.model(input_ids)))


def make_toy(config: ToyConfig, seed: int = 0) -> Toy:
    """Return a toy in eval mode whose every parameter moves the logits.

    Weights are drawn in float64 from one generator in the order of the parameters' names, so
    configurations with the same parameters get the same weights, whatever their spelling.
    """
    generator = torch.Generator().manual_seed(seed)
    toy = Toy(config).eval().requires_grad_(False)
    for name, parameter in sorted(toy.named_parameters()):
        shape = parameter.shape
        if "norm" in name:
            value = 0.5 + torch.rand(shape, generator=generator, dtype=torch.float64)
            value = value - 1 if config.norm == "one_plus" else value
        else:
            value = torch.randn(shape, generator=generator, dtype=torch.float64)
            if name.endswith("bias"):
                value = value / 2
            elif "embed_tokens" not in name:
                value = value / shape[-1] ** 0.5
        parameter.data = value.to(config.dtype)
    return toy


def make_tokens(
    config: ToyConfig, batch: int, length: int, generator: torch.Generator | None = None
) -> Tensor:
    """Return random input_ids, int64 [batch, length]; without a generator always the same."""
    generator = generator or torch.Generator().manual_seed(0)
    return torch.randint(config.vocabulary, (batch, length), generator=generator)


@cache
def export_toy(config: ToyConfig, seed: int = 0) -> ExportedProgram:
    """Export the toy with dynamic batch and sequence (at most MAX_POSITIONS), once: it is read."""
    return export_module(make_toy(config, seed))


def export_module(toy: Toy) -> ExportedProgram:
    """Export a toy that was made, and perhaps changed, before."""
    dimensions = {0: Dim("batch"), 1: Dim("sequence", max=MAX_POSITIONS)}
    return torch.export.export(
        toy, (make_tokens(toy.config, 2, 7),),
        dynamic_shapes={"input_ids": dimensions}, strict=False,
    )


def name_spelling(config: ToyConfig) -> str:
    """Name a configuration by what differs from the default; for pytest's ids."""
    parts = []
    for field in fields(config):
        value = getattr(config, field.name)
        if value is True:
            parts.append(field.name)
        elif value != field.default:
            parts.append(f"{field.name}_{value}".replace("torch.", ""))
    return "-".join(parts) or "default"


SPELLINGS: tuple[ToyConfig, ...] = (
    ToyConfig(),
    # rotary embedding
    ToyConfig(rope="interleaved"),
    ToyConfig(rope="complex"),
    ToyConfig(rope="partial"),
    ToyConfig(rope="none"),
    # attention core
    ToyConfig(attention="eager"),
    ToyConfig(gqa="repeat_interleave"),
    ToyConfig(gqa="enable_gqa"),
    ToyConfig(attention="eager", gqa="repeat_interleave", kv_heads=1, head_dim=16),
    ToyConfig(kv_heads=4),
    # packed projections
    ToyConfig(packed_qkv="split"),
    ToyConfig(packed_qkv="slice", packed_gate_up="slice", attention_bias=True, mlp_bias=True),
    ToyConfig(packed_qkv="chunk", kv_heads=4, hidden=32),
    ToyConfig(packed_gate_up="chunk"),
    ToyConfig(packed_qkv="split", qk_norm=True),
    # norms
    ToyConfig(norm="spelled"),
    ToyConfig(norm="spelled_mul"),
    ToyConfig(norm="one_plus", activation="gelu_tanh", qk_norm=True, tied=True),
    ToyConfig(qk_norm=True),
    # the rest of the block
    ToyConfig(activation="gelu", mlp_bias=True),
    ToyConfig(activation="relu", tied=True),
    ToyConfig(attention_bias=True, output_bias=True),
    # near misses of T_k and T_v
    ToyConfig(position_bias=True),
    ToyConfig(value_readers=2),
    # precisions
    ToyConfig(norm="spelled", attention="eager", dtype=torch.bfloat16),
    ToyConfig(gqa="enable_gqa", dtype=torch.float64),
)
"""Every option at least once, and the combinations that real models use."""
