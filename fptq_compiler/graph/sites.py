"""Where transforms may act: frozen records that hold names and shapes, found by the passes."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class LinearRef:
    """One linear layer, or a range of one whose weight packs several.

    Attributes:
        node: name of the `aten.linear` node.
        weight, bias: checkpoint names; bias is None where there is none.
        start, stop: the range of output channels that this projection owns.
        features: output channels of the whole weight.
    """

    node: str
    weight: str
    bias: str | None
    start: int
    stop: int
    features: int

    @property
    def width(self) -> int:
        """Output channels of this projection."""
        return self.stop - self.start


@dataclass(frozen=True)
class RopeLayout:
    """What RoPE does to one head, in the channel order of the projection.

    Attributes:
        pairs: (a, b) channels that rotate together.
        passthrough: channels that do not rotate.
        scale: common factor of the map (YaRN's attention factor, a folded query scale).
        style: "half-split", "interleaved" or "other", for reports.
    """

    pairs: tuple[tuple[int, int], ...]
    passthrough: tuple[int, ...]
    scale: float
    style: str


@dataclass(frozen=True)
class AttentionSite:
    """One attention: its core node, projections and head layout.

    `refused` says for each transform that does not apply here why not.
    """

    name: str
    core: str
    q: LinearRef | None
    k: LinearRef | None
    v: LinearRef | None
    o: LinearRef | None
    heads: int
    kv_heads: int
    head_dim: int
    key_node: str
    value_node: str
    rope: RopeLayout | None
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class MlpSite:
    """One MLP: up and down projection, with the gate where there is one."""

    name: str
    up: LinearRef | None
    gate: LinearRef | None
    down: LinearRef
    width: int
    activation: str
    refused: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Branch:
    """One residual branch: the norm that reads the stream and the linear that writes back."""

    stream: str
    norm: str
    writer: LinearRef
    add: str


@dataclass(frozen=True)
class ResidualSite:
    """The residual stream from the embedding to the head.

    Attributes:
        table: checkpoint name of the embedding.
        embedding: the embedding node.
        stream: every node that carries the residual, in order.
        norms: every norm that reads it, the final one last.
        readers: the linears behind those norms, the head last.
        writers: the linears that add to it.
        branches: norm and writer of each addition, in order.
        head: the linear that makes the logits.
        tied: whether the head shares the embedding's parameter.
    """

    width: int
    table: str
    embedding: str
    stream: tuple[str, ...]
    norms: tuple[str, ...]
    readers: tuple[LinearRef, ...]
    writers: tuple[LinearRef, ...]
    branches: tuple[Branch, ...]
    head: LinearRef
    tied: bool
    refused: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Sites:
    """All that was found in one model."""

    attention: tuple[AttentionSite, ...] = ()
    mlp: tuple[MlpSite, ...] = ()
    residual: ResidualSite | None = None
