"""Say at each box which transforms and quantisers the recipe puts there, or why not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch.fx import Node

from fptq_compiler.drawing.condense import Condensed
from fptq_compiler.drawing.scene import SYMBOLS, Box, Chip
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.sites import AttentionSite, LinearRef, MlpSite
from fptq_compiler.inspection import InspectedSite

Edge = tuple[int, int]


class Annotated:
    """Boxes and edges with transforms, bits and quantisers.

    Attributes:
        boxes: those of the condensed graph, then quantisers and T_d's online part.
        edges: from and to a box, by its place.
        before: for each of the added boxes the one that reads it.
    """

    def __init__(
        self, condensed: Condensed, program: Program, sites: tuple[InspectedSite, ...]
    ) -> None:
        """Annotate what was condensed before the insertion.

        Args:
            condensed: boxes and edges.
            program: the same program, with transforms and quantisers inserted.
            sites: what was explained of it.
        """
        self.boxes: list[Box] = list(condensed.boxes)
        self.edges: list[Edge] = list(condensed.edges)
        self.before: dict[int, int] = {}
        self._program = program
        self._place = {n.name: box for box, nodes in enumerate(condensed.nodes) for n in nodes}
        for name, transform in _applied(program):
            self._chip(name, Chip(transform, SYMBOLS[transform]))
        self._refusals(sites)
        self._bits()
        online = [m for m in program.sites.mlp if f"hadamard.{m.name}" in program.maps]
        quantizers = [q for q in program.activation_quantizers if "input" in q.role]
        for quantizer in quantizers:
            box = Box("quantizer", f"INT{quantizer.bits}", details=(
                ("quantiser", quantizer.module), ("role", quantizer.role),
            ))
            self._put_before(quantizer.readers, box)
        for site in online:
            box = Box("online", "T_d", details=(("map", f"hadamard.{site.name}"),))
            self._put_before((site.down.node,), box, behind_quantizer=True)

    def _chip(self, node: str, chip: Chip) -> None:
        box = self._place.get(node)
        if box is not None and chip not in self.boxes[box].chips:
            found = self.boxes[box]
            self.boxes[box] = replace(found, chips=(*found.chips, chip))

    def _refusals(self, sites: tuple[InspectedSite, ...]) -> None:
        """A refused transform is shown where its site is: at the core, the MLP or the table."""
        for site in sites:
            place = self._place.get(site.node) if site.node else self._first_embedding()
            for name, verdict in site.transforms.items():
                if verdict.applies or place is None:
                    continue
                where = f" ({verdict.source})" if verdict.source is not None else ""
                found = self.boxes[place]
                self.boxes[place] = replace(
                    found,
                    chips=(*found.chips, Chip("refused", SYMBOLS[name])),
                    details=(*found.details, (f"no {SYMBOLS[name]}", f"{verdict.reason}{where}")),
                )

    def _first_embedding(self) -> int | None:
        return next((i for i, b in enumerate(self.boxes) if b.kind == "embedding"), None)

    def _bits(self) -> None:
        bits = {q.parameter: q.bits for q in self._program.weight_quantizers}
        for node in self._program.graph.nodes:
            if node.name not in self._place or not node.args:
                continue
            for argument in node.args[:2]:
                name = _parameter(argument) if isinstance(argument, Node) else ""
                if name in bits:
                    self._chip(node.name, Chip("bits", f"INT{bits[name]}"))
        for quantizer in self._program.activation_quantizers:
            if quantizer.role in ("key", "value"):
                letter = quantizer.role[0].upper()
                self._chip(quantizer.readers[0], Chip("bits", f"{letter} INT{quantizer.bits}"))

    def _put_before(
        self, readers: tuple[str, ...], box: Box, *, behind_quantizer: bool = False
    ) -> None:
        """Put a box on the edges into the readers; in front of a quantiser that is there."""
        targets = {self._place[r] for r in readers if r in self._place}
        if behind_quantizer:
            targets = {
                next((a for a, b in self.edges if b == t and self.boxes[a].kind == "quantizer"), t)
                for t in targets
            }
        into = [(a, b) for a, b in self.edges if b in targets]
        if not into:
            return
        added = len(self.boxes)
        self.boxes.append(box)
        self.before[added] = min(targets)
        kept = [edge for edge in self.edges if edge not in into]
        sources = dict.fromkeys((a, added) for a, _ in into)
        readers_now = dict.fromkeys((added, b) for _, b in into)
        self.edges = [*kept, *sources, *readers_now]


def _parameter(argument: Node) -> str:
    """The parameter behind a weight's maps and quantiser; empty where there is none."""
    while argument.op == "call_module" and isinstance(argument.args[0], Node):
        argument = argument.args[0]
    return str(argument.target) if argument.op == "get_attr" else ""


def _applied(program: Program) -> Iterator[tuple[str, str]]:
    """Node and transform of every linear, norm and table that a transform acts on."""
    site = program.sites.residual
    if site is not None and "residual" in program.maps:
        yield site.stream[0], "residual"
        for linear in (*site.readers, *site.writers):
            yield linear.node, "residual"
    if site is not None and program.scaled:
        for norm in site.norms:
            yield norm, "scaling"
    for attention in program.sites.attention:
        for name in ("prerope", "value"):
            if f"{name}.{attention.name}" in program.maps:
                yield from ((ref.node, name) for ref in _ends(attention, name))
    for mlp in program.sites.mlp:
        for name in ("updown", "hadamard"):
            if f"{name}.{mlp.name}" in program.maps:
                yield from ((ref.node, name) for ref in _ends(mlp, name))


def _ends(site: AttentionSite | MlpSite, name: str) -> list[LinearRef]:
    """The linears on both sides of a transform."""
    if isinstance(site, AttentionSite):
        both = (site.q, site.k) if name == "prerope" else (site.v, site.o)
    else:
        both = (site.up, site.down) if name == "updown" else (None, site.down)
    return [ref for ref in both if ref is not None]
