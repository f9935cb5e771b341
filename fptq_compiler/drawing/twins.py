"""Parallel parts that are alike become one: the experts of a block, drawn once with their number.

Two boxes are twins where they say the same, stand in the same row, and are read by and read
twins. That is found by refining what is alike by itself until nothing changes.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

from fptq_compiler.drawing.scene import INPUT, BlockScene


def merge_twins(block: BlockScene) -> BlockScene:
    """The block with one box for each class of twins, `gate_proj × 8` for eight of them."""
    classes = _classes(block)
    first = {kind: classes.index(kind) for kind in classes}
    kept = sorted(first.values())
    place = {kind: kept.index(box) for kind, box in first.items()}
    boxes = []
    for box in kept:
        count = classes.count(classes[box])
        found = block.boxes[box]
        boxes.append(replace(found, title=f"{found.title} × {count}") if count > 1 else found)
    edges = {
        (INPUT if a == INPUT else place[classes[a]], place[classes[b]]) for a, b in block.edges
    }
    gives = {place[classes[box]] for box in block.gives}
    return BlockScene(block.name, tuple(boxes), tuple(sorted(edges)), tuple(sorted(gives)))


def _classes(block: BlockScene) -> list[int]:
    """A number for each box, equal for twins."""
    rows = _rows(block)
    found = _numbered([(box, row) for box, row in zip(block.boxes, rows, strict=True)])
    while True:
        refined = _numbered([
            (
                found[box],
                frozenset(INPUT if a == INPUT else found[a] for a, b in block.edges if b == box),
                frozenset(found[b] for a, b in block.edges if a == box),
                box in block.gives,
            )
            for box in range(len(block.boxes))
        ])
        if len(set(refined)) == len(set(found)):
            return refined
        found = refined


def _rows(block: BlockScene) -> list[int]:
    """The longest path to each box, so that twins never stand behind one another."""
    rows = [0] * len(block.boxes)
    for _ in block.boxes:
        for a, b in block.edges:
            if a != INPUT:
                rows[b] = max(rows[b], rows[a] + 1)
    return rows


def _numbered(keys: Sequence[Hashable]) -> list[int]:
    """Equal numbers for equal keys."""
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(key, len(numbers)) for key in keys]
