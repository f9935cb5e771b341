"""Tables of a report: sites, stages, the audit of the written file, and the summary."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fptq_compiler.cli.collapse import collapse
from fptq_compiler.report import AuditRow, Report, SiteRow, StageRow

_WIDE = 110
"""Columns where the output is no terminal and so has no width of its own."""


def stdout_console() -> Console:
    """Gives the console for results: no markup, for names and shapes may hold brackets."""
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = _WIDE
    return console


def sites_table(rows: Sequence[SiteRow], *, every: bool = False) -> Table:
    """Makes the table of sites.

    Args:
        rows: the report's.
        every: a line for each site instead of one for all blocks alike.
    """
    table = Table(title="Sites", title_justify="left")
    for name in ("site", "kind", "shape", "transforms", "not applied"):
        table.add_column(name, overflow="fold")
    groups = [(g.name, g.row) for g in collapse(rows, _alike)]
    for name, row in [(row.name, row) for row in rows] if every else groups:
        refused = "\n".join(f"{key}: {reason}" for key, reason in row.not_applied.items())
        table.add_row(name, row.kind, row.shape, ", ".join(row.transforms) or "none", refused)
    return table


def _alike(row: SiteRow) -> Hashable:
    return row.kind, row.shape, row.transforms, tuple(sorted(row.not_applied.items()))


def stages_table(rows: Sequence[StageRow]) -> Table:
    """Makes the table of stages, with their sum and the highest peak."""
    table = Table(title="Stages", title_justify="left", show_footer=bool(rows))
    total = sum(row.seconds for row in rows)
    peak = max((row.peak_rss_mb for row in rows), default=0.0)
    table.add_column("stage", footer="all")
    table.add_column("seconds", justify="right", footer=f"{total:.1f}")
    table.add_column("peak memory, MB", justify="right", footer=f"{peak:,.0f}")
    for row in rows:
        table.add_row(row.name, f"{row.seconds:.1f}", f"{row.peak_rss_mb:,.0f}")
    return table


def audit_table(rows: Sequence[AuditRow]) -> Table:
    """Makes the audit of the written file: what was requested against what was written."""
    table = Table(title="Written file", title_justify="left")
    for name in ("tensors for", "requested", "written"):
        table.add_column(name)
    table.add_column("tensors", justify="right")
    table.add_column("MB", justify="right")
    table.add_column("as requested")
    for row in rows:
        verdict = Text("yes") if row.as_requested else Text("NO", style="bold red")
        size = f"{row.bytes / 1e6:,.2f}"
        table.add_row(row.kind, row.requested, row.written, f"{row.tensors:,}", size, verdict)
    return table


def near_miss_lines(report: Report) -> list[str]:
    """Gives one line per distinct near miss, with how often it occurred."""
    counts: dict[str, int] = {}
    for miss in report.near_misses:
        counts[miss] = counts.get(miss, 0) + 1
    return [f"{miss} (×{count})" if count > 1 else miss for miss, count in counts.items()]


def print_sites(console: Console, report: Report, *, every: bool) -> None:
    """Prints the sites and what nearly was one."""
    console.print(sites_table(report.sites, every=every))
    misses = near_miss_lines(report)
    if misses:
        console.print("Near misses:")
        for line in misses:
            console.print(f"  {line}")


def print_summary(console: Console, report: Report, written: str, *, every: bool) -> None:
    """Prints the end of a compilation: sites, decisions, stages, audit, parity and sizes."""
    print_sites(console, report, every=every)
    if report.decisions:
        console.print("Decisions:")
        for decision in report.decisions:
            console.print(f"  {decision}")
    console.print(stages_table(report.stages))
    if report.audit:
        console.print(audit_table(report.audit))
    if report.parity:
        console.print("Checked against ONNX Runtime:")
        for name, value in report.parity.items():
            shown = f"{value:.3g}" if isinstance(value, float) else str(value)
            console.print(f"  {name}: {shown}")
    for name, number in (report.perplexity or {}).items():
        console.print(f"perplexity, {name}: {number:.2f}")
    sizes = f"{report.size_before / 1e6:,.1f} MB before, {report.size_after / 1e6:,.1f} MB after"
    console.print(f"wrote {written}: {sizes}", soft_wrap=True)
