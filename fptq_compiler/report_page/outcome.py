"""What was found, decided, written and checked, and with which settings."""

from __future__ import annotations

from fptq_compiler.recipe import Recipe
from fptq_compiler.report import Report
from fptq_compiler.report_page.elements import (
    Cell,
    bullets,
    folded,
    section,
    table,
    terms,
    verbatim,
)


def summary_section(report: Report) -> str:
    """The compilation in a few numbers."""
    bits = Recipe.from_toml(report.recipe, "report").bits
    figures: dict[str, Cell] = {
        "bits W-A-KV": str(bits),
        "parameters as read, MB": report.size_before / 1e6,
        "written file, MB": report.size_after / 1e6,
        "seconds": sum(row.seconds for row in report.stages),
        "peak memory, MB": max((row.peak_rss_mb for row in report.stages), default=0.0),
    }
    if report.online_operations:
        figures["multiply-adds a token of online transforms"] = f"{report.online_operations:,}"
    if report.tokens_per_second is not None:
        figures["tokens a second in training"] = report.tokens_per_second
    figures |= {f"perplexity of {name}": x for name, x in (report.perplexity or {}).items()}
    return section("In short", terms(figures))


def sites_section(report: Report) -> str:
    """What was found and what was not."""
    rows = [
        (
            row.name, row.kind, row.shape, ", ".join(row.transforms) or "none",
            "; ".join(f"{name}: {reason}" for name, reason in row.not_applied.items()),
        )
        for row in report.sites
    ]
    unknown = [
        (row.kind, row.place, row.reason, str(row.source or ""), row.meaning)
        for row in report.unrecognised
    ]
    return section(
        "Sites",
        table(("site", "kind", "shape", "transforms", "not applied"), rows),
        folded("Near misses", bullets(list(dict.fromkeys(report.near_misses)))),
        folded(
            "Not recognised", table(("kind", "place", "reason", "source", "meaning"), unknown)
        ),
    )


def decisions_section(report: Report) -> str:
    """What was chosen where a choice was open."""
    return section("Decisions", bullets(report.decisions))


def file_section(report: Report) -> str:
    """The tensors of the file, and how it compares with the program."""
    rows = [
        (
            row.kind, row.requested, row.written, row.tensors, row.bytes / 1e6,
            "yes" if row.as_requested else "NO",
        )
        for row in report.audit
    ]
    headings = ("tensors for", "requested", "written", "tensors", "MB", "as requested")
    preserved = table(("pass", "relative error"), list(report.preserved.items()))
    return section(
        "Written file",
        table(headings, rows),
        terms(report.parity),
        folded("Logits in float64 before and after each pass that preserves them", preserved),
    )


def stages_section(report: Report) -> str:
    """Where time and memory went."""
    rows = [
        (row.name, row.seconds, row.peak_rss_mb, row.peak_anonymous_mb) for row in report.stages
    ]
    return section(
        "Stages",
        table(("stage", "seconds", "peak memory, MB", "anonymous peak, MB"), rows),
    )


def settings_section(report: Report) -> str:
    """All that is needed to do it again."""
    return section(
        "Settings",
        terms({"seed": str(report.seed), **report.versions}),
        verbatim(report.recipe),
    )
