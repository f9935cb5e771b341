"""What was found and done, as rows of the report."""

from __future__ import annotations

from collections.abc import Mapping

from fptq_compiler.graph.program import Program
from fptq_compiler.graph.sites import AttentionSite
from fptq_compiler.recipe import NEIGHBOURS, TRANSFORMS
from fptq_compiler.report import SiteRow

KINDS: Mapping[str, tuple[str, ...]] = {
    "residual": ("residual", "scaling"),
    "attention": ("prerope", "value"),
    "mlp": ("updown", "hadamard"),
}
"""FPTQuant's transforms of each kind of site: why one was not applied is always said."""


def applied_transforms(program: Program) -> dict[str, int]:
    """How many sites each transform was applied at; only those that were."""
    counts = dict.fromkeys((*TRANSFORMS, *NEIGHBOURS), 0)
    for name in program.maps:
        counts[transform_of(name)] += 1
    if program.scaled:
        counts["scaling"] = 1
    return {name: count for name, count in counts.items() if count}


def transform_of(name: str) -> str:
    """Of a map: `kronecker_output.X` belongs to "kronecker"."""
    return name.partition(".")[0].partition("_")[0]


def site_rows(program: Program) -> list[SiteRow]:
    """One row a site, with the transforms that were applied and why not the others."""
    rows = []
    residual = program.sites.residual
    if residual is not None:
        shape = (
            f"width {residual.width}, {len(residual.norms)} norms, "
            f"{'tied' if residual.tied else 'untied'} head"
        )
        rows.append(_row(program, "residual", "residual", shape, residual.refused))
    for attention in program.sites.attention:
        shape = _attention_shape(attention)
        rows.append(_row(program, attention.name, "attention", shape, attention.refused))
    for mlp in program.sites.mlp:
        gated = f"gated by {mlp.activation}" if mlp.gated else mlp.activation
        shape = f"width {mlp.width}, {gated}"
        rows.append(_row(program, mlp.name, "mlp", shape, mlp.refused))
    return rows


def _attention_shape(site: AttentionSite) -> str:
    rope = site.rope
    words = "RoPE not recognised"
    if rope is not None and not rope.pairs:
        words = "no RoPE"
    elif rope is not None:
        words = f"RoPE {rope.style}"
        if rope.passthrough:
            words += f" on {2 * len(rope.pairs)} of {site.head_dim} channels"
    return f"{site.heads} heads, {site.kv_heads} KV, dim {site.head_dim}, {words}"


def _row(
    program: Program,
    name: str,
    kind: str,
    shape: str,
    refused: Mapping[str, str],
) -> SiteRow:
    applied, missing = [], {}
    for transform in KINDS[kind]:
        if transform in refused:
            missing[transform] = refused[transform]
        elif _has(program, transform, name):
            applied.append(transform)
        else:
            missing[transform] = "not asked for"
    for transform in NEIGHBOURS:
        if transform in refused:
            missing[transform] = refused[transform]
        elif _has(program, transform, name):
            applied.append(transform)
    return SiteRow(name, kind, shape, tuple(applied), missing)


def _has(program: Program, transform: str, site: str) -> bool:
    if transform == "scaling":
        return program.scaled
    return (transform if transform == "residual" else f"{transform}.{site}") in program.maps


