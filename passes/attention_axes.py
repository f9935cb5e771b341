"""Bring the operands of an attention to (B, H, S, D), and its result back.

    (B·H, S, D)          unflatten the first axis
    (B, H_kv, G, S, D)   flatten heads and groups; keys (B, H_kv, 1, T, D) lose the axis
    (H, B, S, D)         the axis that is as long as the batch goes first
    (H, S, D)            of a batch of one

Only what follows from shapes is decided here; that it is right, and that query heads meet their
own keys, is proved by running (raise_attention).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fptq_compiler.graph.shaped import shaped_call

aten = torch.ops.aten
Sizes = Sequence[Any]  # numbers and symbols


class NoAxesError(Exception):
    """Why the axes of an operand are not those of attention."""


@dataclass(frozen=True)
class Axes:
    """The leading axes of an attention's queries (..., S, D).

    Attributes:
        before: where nodes are put.
        lead: the sizes of the leading axes.
        split: the same, with an axis of the batch alone.
        batch: which of `split` that is.
        heads: the others, those that keys are repeated along last.
        sources: nodes from which sizes may be read.
    """

    before: Node
    lead: tuple[Any, ...]
    split: tuple[Any, ...]
    batch: int
    heads: tuple[int, ...]
    sources: tuple[Node, ...]

    @classmethod
    def of(
        cls, before: Node, lead: Sizes, of_keys: Sizes, batch: Any, sources: Sequence[Node]
    ) -> Axes:
        """Find the batch among the leading axes of queries.

        Raises:
            NoAxesError: there is none.
        """
        split, place = list(lead), -1
        for axis, size in enumerate(lead):
            inner = _ratio(size, batch)
            if inner:
                place = axis
                split[axis : axis + 1] = [batch, inner] if inner > 1 else [size]
                break
        if place < 0 and equal(batch, 1):
            split, place = [1, *lead], 0
        if place < 0:
            reason = f"no axis of the queries ({len(lead)} before the last two) holds the batch"
            raise NoAxesError(reason)
        heads = [axis for axis in range(len(split)) if axis != place]
        axes = cls(before, tuple(lead), tuple(split), place, tuple(heads), tuple(sources))
        repeated = axes._split_of(of_keys)
        ordered = sorted(heads, key=lambda axis: equal(repeated[axis], 1))
        return cls(before, tuple(lead), tuple(split), place, tuple(ordered), tuple(sources))

    def canonical(self, x: Node, lead: Sizes) -> Node:
        """`x` (lead..., T, D) as (B, H, T, D), with fewer heads where `lead` has ones."""
        sizes = self._split_of(lead)
        x = self.reshaped(x, (*sizes, *x.meta["val"].shape[-2:]))
        rank = len(sizes)
        x = self._permuted(x, [self.batch, *self.heads, rank, rank + 1])
        if rank == 1:
            return self._call(aten.unsqueeze.default, x, 1)
        return x if rank == 2 else self._call(aten.flatten.using_ints, x, 1, rank - 1)

    def back(self, x: Node, shape: Sizes) -> Node:
        """The result (B, H, S, D) in the axes of the weights, in the given shape."""
        rank = len(self.split)
        if rank == 1:
            x = self._call(aten.squeeze.dim, x, 1)
        elif rank > 2:
            sizes = [self.split[axis] for axis in self.heads]
            x = self._call(aten.unflatten.int, x, 1, sizes)
        order = [self.batch, *self.heads, rank, rank + 1]
        x = self._permuted(x, [order.index(axis) for axis in range(rank + 2)])
        return self.reshaped(x, shape)

    def mask(self, mask: Node, at: Node) -> Node:
        """A mask that is applied to scores `at` (..., S, T) as one for (B, H, S, T)."""
        sizes = at.meta["val"].shape
        shape = mask.meta["val"].shape
        if len(shape) <= 2:
            return mask
        if all(equal(size, 1) for size in shape[:-2]):
            return self.reshaped(mask, shape[-2:])
        plain = self.split == self.lead and (self.batch, self.heads) == (0, (1,))
        if plain and len(sizes) == 4:
            return mask if len(shape) == 4 else self._call(aten.unsqueeze.default, mask, 0)
        whole = [*[1] * (len(sizes) - len(shape)), *shape[:-2]]
        if not all(map(equal, whole, sizes)):
            whole = list(sizes[:-2])
            wanted = [self._size(size) for size in (*whole, *shape[-2:])]
            mask = self._call(aten.expand.default, mask, wanted)
        return self.canonical(mask, whole)

    def reshaped(self, x: Node, sizes: Sizes) -> Node:
        """`x` in the given sizes; symbols are read off `sources`, one is left to torch.

        Raises:
            NoAxesError: it has other axes.
        """
        shape = x.meta["val"].shape
        if len(sizes) == len(shape) and all(map(equal, sizes, shape)):
            return x
        given = [self._size(size) for size in sizes]
        try:
            return self._call(aten.reshape.default, x, given)
        except (RuntimeError, ValueError) as error:
            reason = f"an operand of shape {tuple(shape)} cannot be {tuple(sizes)}"
            raise NoAxesError(reason) from error

    def _split_of(self, lead: Sizes) -> list[Any]:
        """The sizes that `lead`, of any operand, has in the axes of `split`."""
        for whole in (self.lead, self.split):
            if len(lead) == len(whole) and all(map(_divides, lead, whole)):
                break
            if len(lead) < len(whole) and all(map(equal, lead, whole)):
                lead = [*lead, *[1] * (len(whole) - len(lead))]
                break
        else:
            return list(self.split)
        if len(lead) == len(self.split):
            return list(lead)
        if len(self.split) > len(self.lead) and len(self.lead) > self.batch and (
            not equal(lead[self.batch], 1) or equal(self.lead[self.batch], 1)
        ):
            inner = self.split[self.batch : self.batch + 2]
            return [*lead[: self.batch], *inner, *lead[self.batch + 1 :]]
        return [1, *lead]

    def _size(self, size: Any) -> int | Node:
        if isinstance(size, int):
            return size
        for source in self.sources:
            for axis, known in enumerate(source.meta["val"].shape):
                if equal(size, known):
                    return self._call(aten.sym_size.int, source, axis)
        return -1

    def _permuted(self, x: Node, order: list[int]) -> Node:
        return x if order == sorted(order) else self._call(aten.permute.default, x, order)

    def _call(self, target: Any, x: Node, *arguments: Any) -> Node:
        return shaped_call(self.before.graph, self.before, target, (x, *arguments), like=x)


def equal(left: Any, right: Any) -> bool:
    """Whether two sizes are equal whatever the symbols are."""
    return bool(statically_known_true(left == right))


def _divides(part: Any, whole: Any) -> bool:
    """Whether an axis may be the whole axis, or fewer heads of it."""
    if isinstance(part, int) and isinstance(whole, int):
        return whole % part == 0
    return equal(part, whole) or equal(part, 1)


def _ratio(size: Any, batch: Any) -> int:
    """How often the batch goes into a size that it is a factor of; 0 where it is none."""
    if isinstance(size, int) and isinstance(batch, int):
        return size // batch if batch > 1 and size % batch == 0 else int(size == batch)
    if not isinstance(size, torch.SymInt) or not isinstance(batch, torch.SymInt):
        return 0
    found = size.node.expr / batch.node.expr
    return int(found) if found.is_Integer else 0
