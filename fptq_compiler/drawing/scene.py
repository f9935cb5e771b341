"""What there is to draw: boxes, edges and blocks, as names and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

SYMBOLS: Final[Mapping[str, str]] = {
    "residual": "T_r", "prerope": "T_k", "value": "T_v", "updown": "T_u", "hadamard": "T_d",
    "scaling": "S_n",
}
"""The paper's signs of the transforms."""


@dataclass(frozen=True)
class Chip:
    """A small label: `kind` is the name of a transform, `bits`, or `refused`."""

    kind: str
    text: str


@dataclass(frozen=True)
class Box:
    """One thing that the model computes.

    Attributes:
        kind: embedding, norm, linear, attention, mlp, add, quantizer, online, other or unknown.
        title: the last part of its module's path, or what it does.
        lines: shapes and layout, for a reader.
        chips: transforms, bits, and transforms that were refused.
        details: label and text of what a click shows: node, weight, source, reasons. They are
            not compared where blocks are.
    """

    kind: str
    title: str
    lines: tuple[str, ...] = ()
    chips: tuple[Chip, ...] = ()
    details: tuple[tuple[str, str], ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class BlockScene:
    """The boxes of a block in order, and its edges.

    Attributes:
        name: embedding, head, or the path of the block.
        boxes: in the order of the graph.
        edges: from and to a box, by its place; INPUT is what earlier blocks give.
        gives: the boxes that later blocks read.
    """

    name: str = field(compare=False)
    boxes: tuple[Box, ...]
    edges: tuple[tuple[int, int], ...]
    gives: tuple[int, ...] = field(compare=False)


INPUT: Final = -1


@dataclass(frozen=True)
class Run:
    """Blocks that stand one behind the other `count` times."""

    blocks: tuple[BlockScene, ...]
    count: int
    name: str


@dataclass(frozen=True)
class Scene:
    """A whole model.

    Attributes:
        title: the model's name.
        words: its size, what export cost, the setting of the recipe.
        legend: for each transform its sign and at how many sites it is.
        runs: the blocks.
    """

    title: str
    words: str
    legend: tuple[tuple[Chip, str], ...]
    runs: tuple[Run, ...]
