"""Where transforms may act: frozen records that hold names and shapes, found by the passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace


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

    @property
    def gated(self) -> bool:
        """Whether one projection's activation multiplies another projection."""
        return self.up is not None and self.gate is not None


@dataclass(frozen=True)
class Branch:
    """One addition to the residual stream behind a norm.

    Attributes:
        stream: the value of the stream that was normalised last.
        norms: the norms that read it.
        value: what is added.
        add: the addition.
    """

    stream: str
    norms: tuple[str, ...]
    value: str
    add: str


@dataclass(frozen=True)
class ResidualSite:
    """The residual stream from the embeddings to the head.

    Attributes:
        tables: checkpoint names of what begins the stream: embeddings, learned positions.
        stream: every node that carries the residual, in order.
        norms: every norm that reads it, the final one last.
        readers: the linears that read it, behind norms or not, the head last.
        writers: the linears that add to it.
        branches: every addition behind the first norm, in order.
        head: the linear that makes the logits.
        tied: whether the head shares an embedding's parameter.
        refused: T_r ("residual") and S_n ("scaling") where they do not hold, and why.
    """

    width: int
    tables: tuple[str, ...]
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
    routers: tuple[LinearRef, ...] = ()

    def refusing(self, site: AttentionSite | MlpSite, transform: str, reason: str) -> Sites:
        """The same sites with one transform refused at one of them."""
        refused = {**site.refused, transform: reason}
        return replace(
            self,
            attention=tuple(
                replace(s, refused=refused) if s is site else s for s in self.attention
            ),
            mlp=tuple(replace(s, refused=refused) if s is site else s for s in self.mlp),
        )

    def with_linears(self, change: Callable[[LinearRef], LinearRef]) -> Sites:
        """The same sites with every record of a linear changed."""

        def maybe(ref: LinearRef | None) -> LinearRef | None:
            return None if ref is None else change(ref)

        residual = self.residual
        if residual is not None:
            residual = replace(
                residual,
                head=change(residual.head),
                readers=tuple(change(r) for r in residual.readers),
                writers=tuple(change(w) for w in residual.writers),
            )
        return Sites(
            attention=tuple(
                replace(s, q=maybe(s.q), k=maybe(s.k), v=maybe(s.v), o=maybe(s.o))
                for s in self.attention
            ),
            mlp=tuple(
                replace(s, up=maybe(s.up), gate=maybe(s.gate), down=change(s.down))
                for s in self.mlp
            ),
            residual=residual,
            routers=tuple(change(r) for r in self.routers),
        )
