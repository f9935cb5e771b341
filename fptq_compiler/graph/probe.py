"""Find out what a region computes by evaluating it, not by reading its spelling.

Between two linear layers most of what models do is linear in the values that pass: heads are
split and merged, RoPE rotates pairs, values are repeated for grouped queries. The functions
here bind the region's source to chosen values in float64 and read the answer off the result.
Each gives a value or a `Refusal` in words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.fx import Node

from fptq_compiler.graph.evaluate import Region, ancestors
from fptq_compiler.graph.sites import RopeLayout

aten = torch.ops.aten
EXACT = 1e-9
ROTARY = 2e-6  # RoPE tables are float32 in most models; their rows are rotations to 1e-7
SEQUENCE = 13


@dataclass(frozen=True)
class Refusal:
    """Why a region is not what was asked for, and the node that shows it."""

    reason: str
    node: Node | None = None


def between(source: Node, target: Node) -> set[Node]:
    """The nodes on the paths from `source` to `target`, without `source`."""
    reached = {source}
    path: set[Node] = set()
    for node in ancestors(target, (source,)):
        if not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
            path.add(node)
    return path


def outside_reader(source: Node, region: set[Node], target: Node) -> Node | None:
    """A node that reads the region's values, not only their sizes, but does not belong to it."""
    for node in (source, *region):
        if node is target:
            continue
        for reader in node.users:
            inside = reader in region or reader is target
            if not inside and reader.target is not aten.sym_size.int:
                return reader
    return None


def _random(shape: Sequence[int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tuple(shape), generator=generator, dtype=torch.float64) + 0.5


class Probe:
    """Evaluates regions of one graph at one small size; tables and masks are computed once."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.region = Region(module, 2, SEQUENCE)
        self._module = module

    def channel_source(
        self, source: Node, target: Node, channels: int
    ) -> tuple[Tensor, float] | Refusal:
        """Which source channel each (head, dim) of `target` holds at position 0.

        Args:
            source: a projection's output (B, S, C).
            target: an operand of attention (B, H, S, D).
            channels: C.

        Returns:
            Indices (H, D) into C, and the common factor; or why there are none.
        """
        shape = self.region.shape(source)
        first, second = _random(shape, 1), _random(shape, 2)
        zero = self.region.value(target, {source: torch.zeros(shape, dtype=torch.float64)})
        if zero.abs().max() > EXACT:
            return Refusal("something is added that does not come from the projection", target)
        if self.region.shape(target)[0] != shape[0] or zero.dim() != 4:
            return Refusal(f"the operand has shape {tuple(zero.shape)}, not (B, H, S, D)", target)
        out_first = self.region.value(target, {source: first})
        out_second = self.region.value(target, {source: second})
        both = self.region.value(target, {source: 2 * first - 3 * second})
        if (both - (2 * out_first - 3 * out_second)).abs().max() > EXACT * both.abs().max():
            return Refusal("the path is not linear (a norm or an activation stands in it)", target)
        ratio = (first / second)[0, 0]
        found = (out_first / out_second)[0, :, 0, :]
        order = ratio.argsort()
        slot = torch.searchsorted(ratio[order].contiguous(), found.contiguous())
        slot = slot.clamp(0, channels - 1)
        lower = (slot - 1).clamp(0)
        nearer = (ratio[order][lower] - found).abs() < (ratio[order][slot] - found).abs()
        index = order[torch.where(nearer, lower, slot)]
        factor = out_first[0, :, 0, :] / first[0, 0][index]
        common = float(factor.median())
        if not torch.allclose(factor, torch.full_like(factor, common), rtol=ROTARY, atol=0):
            return Refusal(
                "at position 0 the heads do not hold scaled channels of the projection", target
            )
        return index, common

    def is_head_split(self, source: Node, target: Node, index: Tensor, factor: float) -> bool:
        """Whether every position holds the channels that position 0 holds."""
        values = _random(self.region.shape(source), 3)
        expected = values[..., index].permute(0, 2, 1, 3) * factor
        found = self.region.value(target, {source: values})
        return bool((found - expected).abs().max() <= EXACT * expected.abs().max())

    def is_head_merge(self, source: Node, target: Node) -> bool:
        """Whether `target` (B, S, H·D) is `source` (B, H, S, D) with its heads side by side."""
        values = _random(self.region.shape(source), 4)
        found = self.region.value(target, {source: values})
        expected = values.transpose(1, 2).flatten(2)
        return found.shape == expected.shape and bool(torch.equal(found, expected))

    def equals(self, source: Node, target: Node) -> bool:
        """Whether `target` holds the values of `source`, in the same shape and places."""
        values = _random(self.region.shape(source), 8)
        return bool(torch.equal(self.region.value(target, {source: values}), values))

    def repeats_heads(self, source: Node, target: Node) -> bool:
        """Whether `target` (B, H, T, D) repeats each head of `source` (B, H_kv, T, D)."""
        values = _random(self.region.shape(source), 5)
        found = self.region.value(target, {source: values})
        if found.dim() != 4 or found.shape[1] % values.shape[1]:
            return False
        expected = values.repeat_interleave(found.shape[1] // values.shape[1], 1)
        return found.shape == expected.shape and bool(torch.equal(found, expected))

    def rope(
        self, source: Node, target: Node, index: Tensor, factor: float
    ) -> RopeLayout | Refusal:
        """Read off which pairs of channels rotate, from basis vectors at a few positions.

        Args:
            source: the projection's output (B, S, C).
            target: the operand (B, H, S, D).
            index: source channel (H, D) of each operand channel at position 0.
            factor: the common factor at position 0.
        """
        width = index.shape[1]
        maps = self._position_maps(source, target, index)  # (S, H, D_in, D_out)
        if isinstance(maps, Refusal):
            return maps
        if (maps - maps[:, :1]).abs().max() > EXACT:
            return Refusal("the heads are not treated alike", target)
        maps = maps[:, 0] / factor
        off = maps * (1 - torch.eye(width, dtype=maps.dtype))
        linked = off.abs().amax(0) > EXACT  # (D, D)
        if linked.sum(1).max() > 1:
            return Refusal("a channel mixes with more than one other: not a rotation of pairs",
                           target)
        pairs, passthrough = [], []
        for a in range(width):
            if not linked[a].any():
                passthrough.append(a)
                continue
            b = int(linked[a].nonzero()[0, 0])
            if not bool(linked[b, a]):
                return Refusal(f"channel {a} moves to {b} but not back", target)
            if a < b:
                pairs.append((a, b))
        for a, b in pairs:
            block = maps[:, [a, b]][:, :, [a, b]]
            rotation = (
                (block[:, 0, 0] - block[:, 1, 1]).abs().max() <= ROTARY
                and (block[:, 0, 1] + block[:, 1, 0]).abs().max() <= ROTARY
                and (block[:, 0].square().sum(-1) - 1).abs().max() <= ROTARY
            )
            if not rotation:
                return Refusal(f"channels {a} and {b} do not rotate: the map between them at "
                               "some position is no rotation", target)
        still = maps[:, passthrough][:, :, passthrough]
        if passthrough and (still - torch.eye(len(passthrough))).abs().max() > ROTARY:
            return Refusal("channels that do not rotate change with the position", target)
        return RopeLayout(tuple(pairs), tuple(passthrough), factor, _style(pairs))

    def _position_maps(self, source: Node, target: Node, index: Tensor) -> Tensor | Refusal:
        """The operand's map of each head at each position: (S, H, D_in, D_out)."""
        width = index.shape[1]
        shape = self.region.shape(source)
        batch = shape[0]
        rows = []
        for start in range(0, width, batch):
            basis = torch.zeros(shape, dtype=torch.float64)
            stop = min(start + batch, width)
            for row, channel in enumerate(range(start, stop)):
                basis[row, :, index[:, channel]] = 1.0
            found = self.region.value(target, {source: basis})
            rows.append(found[: stop - start])
        maps = torch.cat(rows).permute(2, 1, 0, 3)
        check = _random(shape, 6)
        per_head = check[..., index]  # (B, S, H, D)
        predicted = torch.einsum("bshd,shde->bhse", per_head, maps)
        actual = self.region.value(target, {source: check})
        if (predicted - actual).abs().max() > EXACT * actual.abs().max():
            return Refusal("the heads or the tokens mix before attention", target)
        return maps


def _style(pairs: Sequence[tuple[int, int]]) -> str:
    count = len(pairs)
    if not pairs:
        return "none"
    if list(pairs) == [(i, i + count) for i in range(count)]:
        return "half-split"
    if list(pairs) == [(2 * i, 2 * i + 1) for i in range(count)]:
        return "interleaved"
    return "other"
