"""Names of repeated blocks drawn together: `model.layers 0-29 mlp` for thirty sites alike.

Experts in them as well: `model.layers 0-29 mlp.experts 0-7`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar


class Named(Protocol):
    """What has a name."""

    @property
    def name(self) -> str:
        """With the block's number as a part of its own, for example `blocks.7.attention`."""


Row = TypeVar("Row", bound=Named)


@dataclass
class Group(Generic[Row]):
    """Rows that differ by nothing but the numbers of block and expert; `row` is the first."""

    row: Row
    prefix: str
    suffix: str
    count: int = 0
    numbers: list[int] = field(default_factory=list)
    experts: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The rows' common name, with the numbers that occur."""
        if not self.numbers:
            return self.row.name
        blocks, experts = number_ranges(self.numbers), number_ranges(self.experts)
        words = [self.prefix, blocks, self.suffix, experts]
        return " ".join(word for word in words if word)


def number_ranges(numbers: Iterable[int]) -> str:
    """Writes numbers with runs drawn together: 0, 1, 2, 5 is `0-2,5`."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def collapse(rows: Sequence[Row], alike: Callable[[Row], Hashable]) -> list[Group[Row]]:
    """Draws rows of repeated blocks together.

    Args:
        rows: in order.
        alike: what must be equal beside the name.
    """
    groups: dict[Hashable, Group[Row]] = {}
    for row in rows:
        found = re.fullmatch(r"(.*?)\.(\d+)(?:\.(.*?))?(?:\.(\d+))?", row.name)
        prefix, suffix = (found[1], found[3] or "") if found else (row.name, "")
        key = prefix, suffix, bool(found), alike(row)
        group = groups.setdefault(key, Group(row, prefix, suffix))
        group.count += 1
        if found:
            group.numbers.append(int(found[2]))
            group.experts += [int(number) for number in (found[4],) if number]
    return list(groups.values())


def without_numbers(words: str) -> str:
    """Words with the numbers of nodes left out: `add_7 reads it` and `add_19 reads it` alike."""
    return re.sub(r"_\d+\b", "", words)
