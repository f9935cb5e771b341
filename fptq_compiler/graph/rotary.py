"""RoPE as a table: the angles of every position, read off a region by evaluating it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.fx import Node

from fptq_compiler.graph.evaluate import Region
from fptq_compiler.graph.probe import Probe, Refusal
from fptq_compiler.graph.sites import RopeLayout

TABLE = 1e-6  # float32 tables of positions in the thousands; a wrong frequency shows at once


@dataclass(frozen=True)
class Rotary:
    """Cosines and sines (L, R / 2) float32, and how the rotated channels lie in a head."""

    cos: Tensor
    sin: Tensor
    interleaved: bool

    def equals(self, other: Rotary) -> bool:
        """Whether both rotate alike."""
        same = self.interleaved == other.interleaved
        return same and torch.equal(self.cos, other.cos) and torch.equal(self.sin, other.sin)


@dataclass(frozen=True)
class HeadMap:
    """How an operand (B, H, S, D) of attention follows from `source` (B, S, H·D)."""

    source: Node
    heads: int
    layout: RopeLayout
    factor: float


def head_map(probe: Probe, operand: Node) -> HeadMap | Refusal:
    """The nearest tensor (B, S, H·D) before `operand`, and the rotation between the two."""
    shape = probe.region.shape(operand)
    if len(shape) != 4:
        return Refusal(f"the operand has rank {len(shape)}, expected (B, H, S, D)", operand)
    heads, width = shape[1], shape[3]
    source = _merged(probe, operand, (shape[0], shape[2], heads * width))
    if source is None:
        return Refusal(f"nothing before it has shape (B, S, {heads * width})", operand)
    found = probe.channel_source(source, operand, heads * width)
    if isinstance(found, Refusal):
        return found
    index, factor = found
    if not torch.equal(index, torch.arange(heads * width).view(heads, width)):
        return Refusal("the heads do not lie side by side before it", operand)
    if probe.is_head_split(source, operand, index, factor):
        layout = RopeLayout((), tuple(range(width)), factor, "none")
        return HeadMap(source, heads, layout, factor)
    layout_found = probe.rope(source, operand, index, factor)
    if isinstance(layout_found, Refusal):
        return layout_found
    return HeadMap(source, heads, layout_found, factor)


def _merged(probe: Probe, operand: Node, shape: tuple[int, ...]) -> Node | None:
    """Walk back along the only inputs that are large enough to hold the operand."""
    node = operand
    while True:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and probe.region.shape(node) == shape:
            return node
        large = [x for x in node.all_input_nodes if _holds_tokens(probe, x, shape)]
        if not large:
            return None
        node = max(large)  # the last one made: all others lead to it or are parts of the same


def _holds_tokens(probe: Probe, node: Node, shape: tuple[int, ...]) -> bool:
    """Whether the value depends on batch and sequence, as tables of positions do not."""
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):  # the parts of what it takes apart
        return _holds_tokens(probe, node.all_input_nodes[0], shape)
    if not isinstance(value, torch.Tensor):
        return False
    found = probe.region.shape(node)
    return len(found) > 2 and found[0] == shape[0] and node.op != "placeholder"


class RotaryTables:
    """Reads tables of angles, each kind of RoPE once at full length."""

    def __init__(self, module: fx.GraphModule, probe: Probe, length: int) -> None:
        """Take the number of positions that every table is to have."""
        self._module = module
        self._probe = probe
        self._length = length
        self._known: list[tuple[Tensor, Rotary]] = []

    def of(self, mapped: HeadMap, operand: Node) -> Rotary | Refusal | None:
        """The table, without the common factor; None where nothing rotates.

        A layout that no runtime operator has, or angles that change with the length of the
        sequence (which a cache cannot follow), give a Refusal.
        """
        layout = mapped.layout
        if layout.style == "none":
            return None
        if layout.style == "other" or layout.passthrough[:1] == (0,):
            pairs = layout.pairs[:3]
            reason = f"the rotated pairs {pairs}… are neither halves nor neighbours"
            return Refusal(reason, operand)
        interleaved = layout.style == "interleaved"
        short = _angles(self._probe.region, mapped, operand)
        for first, rotary in self._known:
            alike = rotary.interleaved == interleaved and first.shape == short.shape
            if alike and torch.equal(first, short):
                return rotary
        try:
            table = _angles(Region(self._module, 1, self._length), mapped, operand)
        except (RuntimeError, IndexError) as error:
            reason = (
                f"its angles cannot be evaluated for {self._length} positions ({error}); give "
                "--max-length the length of the model's own tables"
            )
            return Refusal(reason, operand)
        if (table[:, : short.shape[1]] - short).abs().max() > TABLE:
            return Refusal("the angles change with the length of the sequence, which keys that "
                           "are stored already cannot follow", operand)
        cos, sin = table.to(torch.float32)
        rotary = Rotary(cos.contiguous(), sin.contiguous(), interleaved)
        self._known.append((short, rotary))
        return rotary


def _angles(region: Region, mapped: HeadMap, operand: Node) -> Tensor:
    """(2, L, R / 2): what the first channel of every pair becomes, on itself and its partner."""
    first = [a for a, _ in mapped.layout.pairs]
    second = [b for _, b in mapped.layout.pairs]
    basis = torch.zeros(region.shape(mapped.source), dtype=torch.float64)
    basis[..., first] = 1.0
    found = region.value(operand, {mapped.source: basis})[0, 0] / mapped.factor
    return torch.stack((found[:, first], found[:, second]))
