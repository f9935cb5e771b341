"""From a program to a scene: condense before the insertion, annotate after it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fptq_compiler.drawing.annotate import Annotated
from fptq_compiler.drawing.blocks import deal, runs
from fptq_compiler.drawing.condense import Condensed
from fptq_compiler.drawing.scene import SYMBOLS, Chip, Scene
from fptq_compiler.drawing.twins import merge_twins
from fptq_compiler.graph.blocks import outline
from fptq_compiler.graph.program import Program
from fptq_compiler.inspection import Inspection

NUMBERED = re.compile(r"(.*?\.\d+)\.")


class Draft:
    """A program before anything is inserted: its boxes, and the block of each."""

    def __init__(self, program: Program) -> None:
        self.condensed = Condensed(program)
        self.labels = _labels(program, self.condensed)


def make_scene(draft: Draft, program: Program, found: Inspection) -> Scene:
    """What there is to draw of a program with everything inserted, and of its inspection."""
    marked = Annotated(draft.condensed, program, found.sites)
    labels = list(draft.labels)
    order = list(range(len(draft.labels)))
    for added in range(len(draft.labels), len(marked.boxes)):
        reader = marked.before[added]
        labels.append(labels[reader])
        order.insert(order.index(reader), added)
    place = {box: i for i, box in enumerate(order)}
    blocks = deal(
        [marked.boxes[i] for i in order],
        [(place[a], place[b]) for a, b in marked.edges],
        [labels[i] for i in order],
    )
    blocks = [merge_twins(block) for block in blocks]
    return Scene(found.model, _words(found), _legend(found), runs(blocks))


def _words(found: Inspection) -> str:
    cost = found.export
    return (
        f"{cost.parameters / 1e6:,.1f} M parameters · {cost.bytes / 1e6:,.1f} MB · "
        f"{cost.nodes:,} nodes · captured in {cost.seconds:.1f} s"
    )


def _legend(found: Inspection) -> tuple[tuple[Chip, str], ...]:
    """For each transform how many of its sites it applies at."""
    rows = []
    for name, symbol in SYMBOLS.items():
        verdicts = [s.transforms[name].applies for s in found.sites if name in s.transforms]
        words = f"{name} {sum(verdicts)} of {len(verdicts)}" if verdicts else f"{name}, no site"
        rows.append((Chip(name if any(verdicts) else "refused", symbol), words))
    return tuple(rows)


def _labels(program: Program, condensed: Condensed) -> list[str]:
    """The block of each box: by the outline, or by the numbers of the parameters.

    The outline cuts in front of attentions; where it holds two numbered modules together, one of
    them has no attention that is known.
    """
    blocks, paths = outline(program), _paths(condensed)
    where = {node: number for number, block in enumerate(blocks) for node in block.nodes}
    numbers = [where.get(nodes[-1], 0) for nodes in condensed.nodes]
    names = [block.name for block in blocks]
    for number in range(1, len(blocks) - 1):
        inside = {p for p, n in zip(paths, numbers, strict=True) if n == number and p}
        if len(inside) == 1:
            names[number] = inside.pop()
        elif inside:
            return _by_paths(paths, condensed.edges)
    if len(blocks) == 1:
        return _by_paths(paths, condensed.edges)
    return [names[n] for n in numbers]


def _paths(condensed: Condensed) -> list[str]:
    """The numbered part of each box's parameter, `model.layers.3`; empty without one."""
    found = []
    for box in condensed.boxes:
        parameters = [text for label, text in box.details if label in ("weight", "gain")]
        match = NUMBERED.match(parameters[0]) if parameters else None
        found.append(match[1] if match else "-" if parameters else "")
    return found


def _by_paths(paths: Sequence[str], edges: Sequence[tuple[int, int]]) -> list[str]:
    """A box without a parameter stands with the last one that it reads."""
    order = list(dict.fromkeys(p for p in paths if p not in ("", "-")))
    rank = {"embedding": 0, **{p: i for i, p in enumerate(order, 1)}, "head": len(order) + 1}
    names = list(rank)
    ranks: list[int] = []
    for box, path in enumerate(paths):
        read = max((ranks[a] for a, b in edges if b == box and a < box), default=0)
        if path in rank:
            ranks.append(rank[path])
        elif path == "-" and read:
            ranks.append(len(order) + 1)
        else:
            ranks.append(read)
    return [names[r] for r in ranks]


