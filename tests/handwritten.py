"""One decoder block as people write it by hand: every part in several spellings.

`Block` computes the same decoder whatever its `Spelling`: queries, keys and values from one weight
or three, as linears, products or einsums; grouped keys repeated in seven ways; attention on axes
in five orders; the causal mask and the scale in as many. `break_with` puts something into the
block that one of the transforms does not allow.

Shapes: B batch, S sequence, H heads, K key-value heads, D head_dim, G queries that share keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional

VOCABULARY, HIDDEN, HEADS, HEAD, MLP, LONGEST = 61, 24, 4, 8, 40, 64
PROJECTIONS = (
    "linear", "matmul", "conv1d", "einsum", "chunk", "split", "narrow", "unbind", "per_head",
)
REPEATS = ("expand", "repeat_interleave", "repeat", "cat", "index", "broadcast", "before_rope")
CORES = ("matmul", "einsum", "bmm", "heads_first", "sdpa")
MASKS = ("tril", "triu", "arange", "buffer", "lowest")
SCALES = ("product", "quotient", "query", "both", "tensor")
ROPES = ("half", "interleaved", "complex", "partial", "none")
BREAKS = {
    "relu_q": "prerope",
    "relu_v": "value",
    "reads_v": "value",
    "position_bias": "prerope",
    "shifted_v": "value",
    "head_gain": "prerope",
    "softmax_axis": "attention",
    "top_k": "attention",
    "relu_scores": "attention",
    "noncausal": "",
    "learned_mask": "",
}
"""What breaks, and what must not be offered then; an empty word: everything still may."""


@dataclass(frozen=True)
class Spelling:
    """How a block is written; the defaults are the plainest."""

    projection: str = "linear"
    repeat: str = "expand"
    core: str = "matmul"
    mask: str = "triu"
    scale: str = "product"
    rope: str = "half"
    kv_heads: int = 2
    broken: str = ""

    @property
    def rotary(self) -> int:
        """Channels of a head that rotate."""
        return {"none": 0, "partial": HEAD // 2}.get(self.rope, HEAD)


def is_possible(spelling: Spelling) -> bool:
    """Whether the parts go together."""
    equal = spelling.kv_heads == HEADS
    thirds = spelling.projection in ("chunk", "unbind")
    widened = spelling.repeat == "broadcast" and (spelling.core != "matmul" or equal)
    one_gain = spelling.broken == "head_gain" and spelling.kv_heads == 1  # a factor of all keys
    return (equal or not thirds) and not widened and not one_gain


class Block(nn.Module):
    """Embedding, one block, norm and head."""

    causal: Tensor
    freqs_cis: Tensor

    def __init__(self, spelling: Spelling, seed: int = 0) -> None:
        super().__init__()
        self.spelling = spelling
        generator = torch.Generator().manual_seed(seed)

        def made(*shape: int, inputs: int = HIDDEN) -> nn.Parameter:
            value = torch.randn(shape, generator=generator) / math.sqrt(inputs)
            return nn.Parameter(value, requires_grad=False)

        kv = spelling.kv_heads
        self.widths = [HEADS * HEAD, kv * HEAD, kv * HEAD]
        self.table = nn.Embedding.from_pretrained(made(VOCABULARY, HIDDEN, inputs=1))
        self.norms = nn.ParameterList(made(HIDDEN, inputs=1).abs() + 0.5 for _ in range(3))
        self.norms.requires_grad_(False)
        if spelling.projection in ("linear", "matmul", "conv1d"):
            shapes = [(w, HIDDEN) if spelling.projection == "linear" else (HIDDEN, w)
                      for w in self.widths]
            self.qkv = nn.ParameterList(made(*s) for s in shapes)
            self.biases = nn.ParameterList(made(w, inputs=4) for w in self.widths)
        elif spelling.projection == "einsum":
            self.qkv = nn.ParameterList(made(w // HEAD, HIDDEN, HEAD) for w in self.widths)
            self.biases = nn.ParameterList(made(w // HEAD, HEAD, inputs=4) for w in self.widths)
        else:
            self.qkv = nn.ParameterList([made(sum(self.widths), HIDDEN)])
            self.biases = nn.ParameterList([made(sum(self.widths), inputs=4)])
        self.output = made(*((HEADS, HEAD, HIDDEN) if spelling.core == "einsum"
                             else (HIDDEN, HEADS * HEAD)), inputs=HEADS * HEAD)
        self.gate, self.up, self.down = made(HIDDEN, MLP), made(HIDDEN, MLP), made(MLP, HIDDEN)
        self.head = made(VOCABULARY, HIDDEN)
        self.position_bias = made(LONGEST, HEAD, inputs=1)
        self.learned_mask = made(LONGEST, LONGEST, inputs=1)
        seen = torch.tril(torch.ones(LONGEST, LONGEST)).view(1, 1, LONGEST, LONGEST)
        self.register_buffer("causal", seen, persistent=False)
        width = max(spelling.rotary, 2)
        angles = torch.outer(
            torch.arange(LONGEST).float(), 100.0 ** -(torch.arange(0, width, 2).float() / width)
        )
        self.register_buffer(
            "freqs_cis", torch.polar(torch.ones_like(angles), angles), persistent=False
        )

    def forward(self, input_ids: Tensor) -> Tensor:
        """Map ids (B, S) to logits (B, S, V)."""
        x = self.table(input_ids)
        x = x + self.attention(self.norm(x, 0))
        h = self.norm(x, 1)
        x = x + (functional.silu(h @ self.gate) * (h @ self.up)) @ self.down
        return functional.linear(self.norm(x, 2), self.head)

    def norm(self, x: Tensor, index: int) -> Tensor:
        return functional.rms_norm(x, (HIDDEN,), self.norms[index], 1e-5)

    def attention(self, x: Tensor) -> Tensor:
        """(B, S, hidden) to (B, S, hidden)."""
        broken = self.spelling.broken
        q, k, v = self.project(x)  # each (B, S, heads, D)
        read = v
        if broken == "relu_q":
            q = q.relu()
        elif broken == "relu_v":
            v = v.relu()
        elif broken == "position_bias":
            q = q + self.position_bias[: x.shape[1], None]
        elif broken == "shifted_v":
            v = v + v.roll(1, 1)
        elif broken == "head_gain":
            k = k * torch.arange(1.0, k.shape[2] + 1)[:, None]
        if self.spelling.repeat == "before_rope":
            k = k.repeat_interleave(HEADS // k.shape[2], 2)
            v = v.repeat_interleave(HEADS // v.shape[2], 2)
        mixed = self.attend(self.rotate(q), self.rotate(k), v)  # (B, S, H, D)
        if self.spelling.core == "einsum":
            y = torch.einsum("bshe,hed->bsd", mixed, self.output)
        else:
            y = functional.linear(mixed.flatten(2), self.output)
        return y + read.mean((2, 3))[..., None] if broken == "reads_v" else y

    def project(self, x: Tensor) -> list[Tensor]:
        """Queries, keys and values, each (B, S, heads, D)."""
        form = self.spelling.projection
        if form == "einsum":
            return [torch.einsum("bsd,hde->bshe", x, w) + b
                    for w, b in zip(self.qkv, self.biases, strict=True)]
        if form in ("linear", "matmul", "conv1d"):
            found = []
            for w, b in zip(self.qkv, self.biases, strict=True):
                if form == "linear":
                    y = functional.linear(x, w, b)
                elif form == "matmul":
                    y = x @ w + b
                else:
                    y = torch.addmm(b, x.view(-1, HIDDEN), w).view(*x.shape[:2], -1)
                found.append(y)
            return self.apart(found)
        packed = functional.linear(x, self.qkv[0], self.biases[0])
        if form == "chunk":
            return self.apart(packed.chunk(3, -1))
        if form == "split":
            return self.apart(packed.split(self.widths, -1))
        if form == "narrow":
            starts = (0, self.widths[0], self.widths[0] + self.widths[1])
            return self.apart([packed.narrow(-1, s, w)
                               for s, w in zip(starts, self.widths, strict=True)])
        if form == "unbind":
            return list(packed.reshape(*x.shape[:2], 3, HEADS, HEAD).unbind(2))
        groups = self.spelling.kv_heads  # a group's queries, its key, its value
        apart = packed.view(*x.shape[:2], groups, HEADS // groups + 2, HEAD)
        return [apart[..., :-2, :].reshape(*x.shape[:2], HEADS, HEAD), apart[..., -2, :],
                apart[..., -1, :]]

    def apart(self, parts: list[Tensor] | tuple[Tensor, ...]) -> list[Tensor]:
        return [x.view(*x.shape[:2], -1, HEAD) for x in parts]

    def rotate(self, x: Tensor) -> Tensor:
        """RoPE on (B, S, heads, D)."""
        form, width = self.spelling.rope, self.spelling.rotary
        if form == "none":
            return x
        freqs = self.freqs_cis[: x.shape[1], None]
        if form == "complex":
            numbers = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
            return torch.view_as_real(numbers * freqs).flatten(3)
        cosine, sine = torch.view_as_real(freqs).unbind(-1)
        if form == "interleaved":
            a, b = x[..., 0::2], x[..., 1::2]
            return torch.stack((a * cosine - b * sine, b * cosine + a * sine), -1).flatten(3)
        turned, rest = x[..., :width], x[..., width:]
        a, b = turned.chunk(2, -1)
        return torch.cat((a * cosine - b * sine, b * cosine + a * sine, rest), -1)

    def repeat(self, x: Tensor) -> Tensor:
        """(B, K, T, D) to (B, H, T, D)."""
        batch, kv, length, width = x.shape
        group = HEADS // kv
        match self.spelling.repeat:
            case "repeat_interleave":
                return x.repeat_interleave(group, 1)
            case "repeat":
                return x.unsqueeze(2).repeat(1, 1, group, 1, 1).flatten(1, 2)
            case "cat":
                return torch.cat([x[:, i // group : i // group + 1] for i in range(HEADS)], 1)
            case "index":
                return x[:, torch.arange(HEADS) // group]
            case _:
                return x[:, :, None].expand(batch, kv, group, length, width).reshape(
                    batch, HEADS, length, width
                )

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, S, H, D) from q (B, S, H, D), k and v (B, S, K, D)."""
        q, k = self.scaled(q, "query", "both"), self.scaled(k, "both")
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if self.spelling.repeat == "broadcast":
            grouped = q.unflatten(1, (k.shape[1], -1))
            weights = self.weights(grouped @ k.unsqueeze(2).transpose(-1, -2))
            return (weights @ v.unsqueeze(2)).flatten(1, 2).transpose(1, 2)
        k, v = self.repeat(k), self.repeat(v)
        batch, heads, length, width = q.shape
        match self.spelling.core:
            case "sdpa" if not self.spelling.broken:
                scale = 1.0 if self.spelling.scale in ("query", "both") else HEAD**-0.5
                mixed = functional.scaled_dot_product_attention(
                    q, k, v, self.seen(length).logical_not(), scale=scale
                )
                return mixed.transpose(1, 2)
            case "einsum":
                q, k, v = (x.transpose(1, 2) for x in (q, k, v))
                weights = self.weights(torch.einsum("bshd,bthd->bhst", q, k))
                return torch.einsum("bhst,bthd->bshd", weights, v)
            case "bmm":
                q, k, v = (x.reshape(batch * heads, -1, width) for x in (q, k, v))
                weights = self.weights(torch.bmm(q, k.mT))
                mixed = torch.bmm(weights, v).view(batch, heads, length, width)
                return mixed.transpose(1, 2).contiguous()
            case "heads_first":
                q, k, v = (x.transpose(0, 1) for x in (q, k, v))
                return (self.weights(q @ k.mT) @ v).permute(1, 2, 0, 3)
            case _:
                return (self.weights(q @ k.mT) @ v).transpose(1, 2)

    def scaled(self, x: Tensor, *forms: str) -> Tensor:
        if self.spelling.scale not in forms:
            return x
        return x * HEAD ** (-0.25 if self.spelling.scale == "both" else -0.5)

    def weights(self, scores: Tensor) -> Tensor:
        """The softmax of scores (..., S, T), scaled and masked."""
        broken, length = self.spelling.broken, scores.shape[-1]
        match self.spelling.scale:
            case "product":
                scores = scores * HEAD**-0.5
            case "quotient":
                scores = scores / math.sqrt(HEAD)
            case "tensor":
                scores = scores * torch.tensor(HEAD**-0.5)
        if broken == "relu_scores":
            scores = scores.relu()
        if broken == "learned_mask":
            scores = scores + self.learned_mask[:length, :length]
        if broken == "top_k":
            least = scores.topk(2, -1).values[..., -1:]
            scores = scores.masked_fill(scores < least, -1e9)
        if broken != "noncausal":
            scores = self.masked(scores)
        return scores.softmax(-2 if broken == "softmax_axis" else -1)

    def seen(self, length: int) -> Tensor:
        """(S, T) booleans, True where a key is hidden."""
        match self.spelling.mask:
            case "tril":
                return ~torch.ones(length, length, dtype=torch.bool).tril()
            case "arange":
                place = torch.arange(length)
                return place[None, :] > place[:, None]
            case "buffer":
                return self.causal[0, 0, :length, :length] == 0
            case _:
                return torch.ones(length, length, dtype=torch.bool).triu(1)

    def masked(self, scores: Tensor) -> Tensor:
        length = scores.shape[-1]
        match self.spelling.mask:
            case "triu":
                return scores + torch.full((length, length), float("-inf")).triu(1)
            case "lowest":
                lowest = torch.finfo(scores.dtype).min
                return torch.where(self.seen(length), lowest, scores)
            case _:
                return scores.masked_fill(self.seen(length), float("-inf"))


def export_block(spelling: Spelling) -> ExportedProgram:
    """Export with dynamic batch and sequence."""
    sizes = {0: Dim("batch"), 1: Dim("sequence", max=LONGEST - 1)}
    ids = torch.arange(14).reshape(2, 7)
    return torch.export.export(
        Block(spelling).eval(), (ids,), dynamic_shapes=(sizes,), strict=False
    )
