"""Deal boxes out to blocks, and draw runs of equal blocks together."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fptq_compiler.drawing.scene import INPUT, BlockScene, Box, Run

LONGEST_PERIOD = 8
"""Blocks of different kinds that may alternate: five sliding and one global are six."""


def deal(
    boxes: Sequence[Box], edges: Sequence[tuple[int, int]], labels: Sequence[str]
) -> list[BlockScene]:
    """Split boxes and edges by the label of each box; labels stand in the order of the graph."""
    scenes = []
    for label in dict.fromkeys(labels):
        members = [i for i, found in enumerate(labels) if found == label]
        place = {box: i for i, box in enumerate(members)}
        inside = {
            (place.get(a, INPUT), place[b]) for a, b in edges if b in place
        }
        gives = {place[a] for a, b in edges if a in place and b not in place}
        scenes.append(BlockScene(
            label, tuple(boxes[i] for i in members), tuple(sorted(inside)), tuple(sorted(gives)),
        ))
    return scenes


def runs(blocks: Sequence[BlockScene]) -> tuple[Run, ...]:
    """Runs of equal blocks, or of equal sequences of up to `LONGEST_PERIOD`, in order."""
    found: list[Run] = []
    start = 0
    while start < len(blocks):
        period, count = _longest(blocks, start)
        part = tuple(blocks[start : start + period])
        stop = start + period * count
        found.append(Run(part, count, common_name([b.name for b in blocks[start:stop]])))
        start = stop
    return tuple(found)


def _longest(blocks: Sequence[BlockScene], start: int) -> tuple[int, int]:
    """The period that repeats over the most blocks, the shortest where several do."""
    best = (1, 1)
    for period in range(1, LONGEST_PERIOD + 1):
        part, count = blocks[start : start + period], 1
        while list(blocks[start + count * period : start + (count + 1) * period]) == list(part):
            count += 1
        if count > 1 and period * count > best[0] * best[1]:
            best = period, count
    return best


def common_name(names: Sequence[str]) -> str:
    """`model.layers 0-29` for its thirty blocks; a single name is itself."""
    if len(names) == 1:
        return names[0]
    numbers = [re.search(r"\d+(?!.*\d)", name) for name in names]
    if not all(numbers):
        return f"{names[0]} to {names[-1]}"
    first, last = numbers[0], numbers[-1]
    assert first is not None
    assert last is not None
    return f"{names[0][: first.start()].rstrip('.')} {first[0]}-{last[0]}"
