"""Explain a program whose sites are found: what each allows, and why it does not allow the rest.

The transforms and quantisers of a recipe are inserted to see which really are: what a later
pass refuses counts as refused. That rewrites the program.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fptq_compiler.graph.pipeline import run_passes
from fptq_compiler.graph.program import NearMiss, Program, source_line
from fptq_compiler.graph.sites import AttentionSite, LinearRef, MlpSite, ResidualSite
from fptq_compiler.inspection import (
    InspectedMiss,
    InspectedQuantizer,
    InspectedSite,
    Verdict,
)
from fptq_compiler.recipe import Recipe
from fptq_compiler.report import SiteRow
from fptq_compiler.source_line import SourceLine
from fptq_compiler.stages import quantizer_placement, transform_insertion
from fptq_compiler.summary import KINDS, site_rows

Site = ResidualSite | AttentionSite | MlpSite


def prepare(program: Program, recipe: Recipe) -> None:
    """Insert what the recipe would: its transforms where possible, and its quantisers."""
    run_passes(program, (*transform_insertion(recipe), quantizer_placement(recipe)))


@dataclass(frozen=True)
class AsFound:
    """What is known before the insertion: words and shapes of the sites, and source lines."""

    rows: tuple[SiteRow, ...]
    sites: tuple[Site, ...]
    sources: dict[str, str]

    @classmethod
    def of(cls, program: Program) -> AsFound:
        """Take down a program whose sites are found."""
        sources = {n.name: source_line(n) for n in program.graph.nodes}
        return cls(tuple(site_rows(program)), _sites(program), sources)


def _sites(program: Program) -> tuple[Site, ...]:
    """The sites in the order of their rows."""
    sites = program.sites
    residual = () if sites.residual is None else (sites.residual,)
    return (*residual, *sites.attention, *sites.mlp)


def explain_sites(program: Program, found: AsFound) -> tuple[InspectedSite, ...]:
    """One record a site.

    Args:
        program: with everything inserted, as `prepare` leaves it.
        found: the same program before that.
    """
    reasons = _Reasons(program)
    records = [
        _explain(program, row, before, words.shape, site, reasons, found.sources)
        for row, words, before, site in zip(
            site_rows(program), found.rows, found.sites, _sites(program), strict=True
        )
    ]
    if program.sites.residual is None:
        row = SiteRow("residual", "residual", "not recognised")
        records.insert(0, _explain(program, row, None, row.shape, None, reasons, found.sources))
    return tuple(records)


def explain_misses(program: Program) -> tuple[InspectedMiss, ...]:
    """The near misses as data."""
    return tuple(
        InspectedMiss(m.what, m.node, m.reason, SourceLine.read(m.source))
        for m in program.near_misses
    )


def explain_quantizers(program: Program) -> tuple[InspectedQuantizer, ...]:
    """The quantisers that were placed, weights first."""
    weights = [
        InspectedQuantizer("weight", q.parameter, q.role, q.bits, ())
        for q in program.weight_quantizers
    ]
    activations = [
        InspectedQuantizer("activation", q.module, q.role, q.bits, q.readers)
        for q in program.activation_quantizers
    ]
    return (*weights, *activations)


class _Reasons:
    """Finds the near miss that stands behind a refusal; each is taken once for a transform."""

    def __init__(self, program: Program) -> None:
        self._misses = program.near_misses
        self._taken: set[tuple[str, int]] = set()

    def find(self, transform: str, reason: str) -> NearMiss | None:
        """The first near miss with these words that no site before has taken."""
        for number, miss in enumerate(self._misses):
            key = transform, number
            if miss.reason == reason and key not in self._taken:
                self._taken.add(key)
                return miss
        return None

    def residual(self) -> NearMiss | None:
        """Why there is no residual site."""
        return next((m for m in self._misses if m.what == "residual"), None)


def _explain(
    program: Program,
    row: SiteRow,
    before: Site | None,
    words: str,
    site: Site | None,
    reasons: _Reasons,
    sources: dict[str, str],
) -> InspectedSite:
    node = _node(site)
    verdicts = {}
    for transform in KINDS[row.kind]:
        if transform in row.transforms:
            verdicts[transform] = Verdict(True)
        elif site is None:
            verdicts[transform] = _refusal(reasons.residual(), "the stream was not found", "")
        else:
            reason = site.refused.get(transform, "a projection was not found")
            verdicts[transform] = _refusal(reasons.find(transform, reason), reason, node)
    return InspectedSite(
        row.name, row.kind, node, SourceLine.read(sources.get(node, "")), _shape(before), words,
        verdicts, _quantizers(program, site),
    )


def _refusal(miss: NearMiss | None, reason: str, node: str) -> Verdict:
    if miss is None:
        return Verdict(False, reason, node)
    return Verdict(False, miss.reason, miss.node, SourceLine.read(miss.source))


def _node(site: Site | None) -> str:
    match site:
        case ResidualSite():
            return site.stream[0]
        case AttentionSite():
            return site.core
        case MlpSite():
            return site.down.node
        case None:
            return ""


def _shape(site: Site | None) -> dict[str, Any]:
    match site:
        case ResidualSite():
            return {
                "width": site.width, "norms": len(site.norms), "branches": len(site.branches),
                "tied_head": site.tied,
            }
        case AttentionSite():
            rope = site.rope
            return {
                "heads": site.heads, "kv_heads": site.kv_heads, "head_dim": site.head_dim,
                "packed": _packed(site.q, site.k, site.v),
                "rope": None if rope is None else {
                    "style": rope.style, "channels": 2 * len(rope.pairs), "scale": rope.scale,
                },
            }
        case MlpSite():
            return {
                "width": site.width, "gated": site.gated,
                "activation": site.activation, "packed": _packed(site.up, site.gate),
            }
        case None:
            return {}


def _packed(*refs: LinearRef | None) -> bool:
    weights = [r.weight for r in refs if r is not None]
    return len(set(weights)) < len(weights)


def _refs(site: Site | None) -> tuple[LinearRef | None, ...]:
    match site:
        case AttentionSite():
            return site.q, site.k, site.v, site.o
        case MlpSite():
            return site.up, site.gate, site.down
        case ResidualSite():
            return (site.head,)
        case None:
            return ()


def _quantizers(program: Program, site: Site | None) -> tuple[str, ...]:
    """The weights and inputs of the site's linears, its keys and values, and the table's."""
    refs = [r for r in _refs(site) if r is not None]
    weights, readers = {r.weight for r in refs}, {r.node for r in refs}
    if isinstance(site, ResidualSite):
        weights.update(site.tables)
    if isinstance(site, AttentionSite):
        readers.add(site.core)
    names = [q.parameter for q in program.weight_quantizers if q.parameter in weights]
    names += [q.module for q in program.activation_quantizers if readers & set(q.readers)]
    return tuple(names)

