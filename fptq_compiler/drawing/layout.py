"""Where the boxes of a block stand: the residual stream is a straight line, branches beside it.

Rows go by the longest path from the block's input. A path that passes rows gets a place in each
of them, so that no box stands on it. Within a row places go by the mean of what they read, then
of what reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

from fptq_compiler.drawing.scene import INPUT, BlockScene, Box

Edge = tuple[int, int]
CHARACTER: Final = 6.8
"""Width of a letter of 12 pixels, a little more than it is in most fonts."""

LINE: Final = 15.0
PADDING: Final = 10.0
CHIP_HEIGHT: Final = 16.0
ROW_GAP: Final = 22.0
GAP: Final = 16.0
RAIL_GAP: Final = 34.0
"""Between the residual stream and the branches beside it."""

ROOM: Final = 10.0
"""Below an addition, for a branch that leaves the stream behind one that came in."""

SWEEPS: Final = 6
SMALL: Final = {"add": (22.0, 22.0), "quantizer": (46.0, 20.0), "online": (46.0, 20.0)}
WIRE: Final = (10.0, 0.0)


@dataclass
class Place:
    """The centre of a box and its size, in pixels."""

    x: float
    y: float
    width: float
    height: float


@dataclass
class Layout:
    """A block on paper.

    Attributes:
        places: of each box.
        paths: for each edge the points that it goes through, from box to box.
        rail: x of the residual stream, where it comes in and goes out.
        stream: the edges that carry it.
        width, height: of the whole.
    """

    places: list[Place]
    paths: dict[Edge, list[tuple[float, float]]]
    rail: float
    stream: frozenset[Edge]
    width: float
    height: float


def chip_width(text: str) -> float:
    """Width of a chip with that text."""
    return len(text) * 6.2 + 12.0


def box_size(box: Box) -> tuple[float, float]:
    """Width and height that the texts of a box need."""
    if box.kind in SMALL:
        return SMALL[box.kind]
    widest = max(len(box.title) * 1.08, *(len(line) for line in ("", *box.lines)))
    chips = sum(chip_width(c.text) + 4.0 for c in box.chips) - 4.0
    width = max(widest * CHARACTER, chips, 70.0) + 2 * PADDING
    rows = LINE * (1 + len(box.lines)) + (CHIP_HEIGHT + 4.0 if box.chips else 0.0)
    return width, rows + 12.0


def spine(block: BlockScene) -> list[int]:
    """The boxes that carry the residual stream: an addition on it, or its only reader."""
    found: list[int] = []
    current = INPUT
    while True:
        readers = [b for a, b in block.edges if a == current]
        additions = [b for b in readers if block.boxes[b].kind == "add"]
        following = additions[-1:] or (readers if len(readers) == 1 else [])
        if not following or following[0] in found:
            break
        current = following[0]
        found.append(current)
    while found and not _carries(block, found):
        found.pop()
    return found


def _carries(block: BlockScene, found: Sequence[int]) -> bool:
    """Whether the last box is on the stream: an addition, a norm behind one, or what goes on."""
    last = found[-1]
    if block.boxes[last].kind == "add" or last in block.gives:
        return True
    read = any(a == last for a, _ in block.edges)
    return not read and len(found) > 1 and block.boxes[found[-2]].kind == "add"


@dataclass
class _Rows:
    """Boxes and the places of passing paths, row by row."""

    block: BlockScene
    rail: set[int]
    rows: list[list[int]] = field(default_factory=list)
    sizes: dict[int, tuple[float, float]] = field(default_factory=dict)
    links: list[Edge] = field(default_factory=list)
    chains: dict[Edge, list[int]] = field(default_factory=dict)


def lay_out(block: BlockScene) -> Layout:
    """Places and paths of a block, its upper left corner at the origin."""
    rail = spine(block)
    table = _rows(block, rail)
    x = _columns(table)
    on_rail = [i for i in rail if x[i] == 0.0]
    reach = max((table.sizes[i][0] / 2 for i in on_rail), default=11.0)
    branch = [i for i in x if i not in table.rail]
    left = min((x[i] - table.sizes[i][0] / 2 for i in branch), default=0.0)
    shift = (reach + RAIL_GAP - left) if rail else -left
    moved = {i: (x[i] if i in table.rail else x[i] + shift) + (reach if rail else 0) for i in x}
    y = _heights(table)
    places = [Place(moved[i], y[i], *table.sizes[i]) for i in range(len(block.boxes))]
    width = max(p.x + p.width / 2 for p in places)
    height = max(p.y + p.height / 2 for p in places)
    start = reach if rail else moved[block.gives[-1]] if block.gives else width / 2
    carried = {INPUT, *rail}
    stream = {(a, b) for a, b in table.chains if a in carried and (b in table.rail or not rail)}
    paths = {}
    for edge, chain in table.chains.items():
        first = (start, -ROW_GAP)
        if edge[0] != INPUT:
            below = table.sizes[edge[0]][1] / 2
            if edge not in stream and edge[0] in table.rail:
                below += ROOM
            first = moved[edge[0]], y[edge[0]] + below
        wires = [(moved[w], y[w]) for w in chain]
        paths[edge] = [first, *wires, (moved[edge[1]], y[edge[1]])]
    return Layout(places, paths, start, frozenset(stream), width, height)


def _rows(block: BlockScene, rail: Sequence[int]) -> _Rows:
    """Deal boxes out to rows by their longest path, with a wire in each row that a path passes."""
    count = len(block.boxes)
    row = dict.fromkeys(range(count), 0)
    for _ in range(count):
        changed = False
        for a, b in block.edges:
            least = row[a] + 1 if a != INPUT else 0
            if row[b] < least:
                row[b], changed = least, True
        if not changed:
            break
    for box in range(count):  # what reads nothing here stands just above its reader
        readers = [row[b] for a, b in block.edges if a == box]
        if readers and not any(b == box for _, b in block.edges):
            row[box] = min(readers) - 1
    table = _Rows(block, set(rail), [[] for _ in range(max(row.values(), default=0) + 1)])
    for box, number in row.items():
        table.rows[number].append(box)
        table.sizes[box] = box_size(block.boxes[box])
    following = count
    for a, b in block.edges:
        chain = []
        on_rail = b in table.rail and (a == INPUT or a in table.rail)
        for number in range(row[a] + 1 if a != INPUT else 0, row[b]):
            if on_rail:
                break
            table.rows[number].append(following)
            table.sizes[following] = WIRE
            chain.append(following)
            following += 1
        table.chains[(a, b)] = chain
        whole = [a, *chain, b]
        table.links += [e for e in pairwise(whole) if e[0] != INPUT]
    return table


def _columns(table: _Rows) -> dict[int, float]:
    """The x of everything: boxes on the rail at 0, the others by their neighbours' mean."""
    above: dict[int, list[int]] = {}
    below: dict[int, list[int]] = {}
    for a, b in table.links:
        if a not in table.rail and b not in table.rail:
            above.setdefault(b, []).append(a)
            below.setdefault(a, []).append(b)
    x = {i: 0.0 for row in table.rows for i in row}
    for row in table.rows:
        _spread([i for i in row if i not in table.rail], above, x, table.sizes)
    for sweep in range(SWEEPS):
        down = sweep % 2 == 1
        for row in table.rows if down else reversed(table.rows):
            free = [i for i in row if i not in table.rail]
            _spread(free, above if down else below, x, table.sizes)
    return x


def _spread(
    row: list[int], near: Mapping[int, list[int]], x: dict[int, float],
    sizes: Mapping[int, tuple[float, float]],
) -> None:
    """Move a row towards its neighbours' means, keeping boxes apart and the row's mean place."""
    if not row:
        return
    wish = {i: _mean([x[n] for n in near[i]]) if near.get(i) else x[i] for i in row}
    order = sorted(row, key=lambda i: (wish[i], row.index(i)))
    put: list[float] = []
    for number, i in enumerate(order):
        least = wish[i]
        if number:
            before = order[number - 1]
            least = put[-1] + (sizes[before][0] + sizes[i][0]) / 2 + GAP
        put.append(max(wish[i], least))
    shift = _mean([wish[i] for i in order]) - _mean(put)
    for i, place in zip(order, put, strict=True):
        x[i] = place + shift


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _heights(table: _Rows) -> dict[int, float]:
    """The y of everything: rows one below the other, each as high as its highest box."""
    y: dict[int, float] = {}
    top = 0.0
    for row in table.rows:
        height = max(table.sizes[i][1] for i in row)
        for i in row:
            y[i] = top + height / 2
        top += height + ROW_GAP + (ROOM if table.rail.intersection(row) else 0.0)
    return y
