"""Tables of a report: sites, stages, the audit of the written file, and the summary."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fptq_compiler.report import AuditRow, Report, SiteRow, StageRow

_WIDE = 110
"""Columns where the output is no terminal and so has no width of its own."""


@dataclass
class _Group:
    """Sites that differ by nothing but the number of their block."""

    row: SiteRow
    prefix: str
    suffix: str
    numbers: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The sites' common name, with the numbers that occur."""
        if not self.numbers:
            return self.row.name
        return f"{self.prefix} {number_ranges(self.numbers)} {self.suffix}".rstrip()


def stdout_console() -> Console:
    """Gives the console for results: no markup, for names and shapes may hold brackets."""
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = _WIDE
    return console


def number_ranges(numbers: Iterable[int]) -> str:
    """Writes numbers with runs drawn together: 0, 1, 2, 5 is `0-2,5`."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def collapse(rows: Sequence[SiteRow]) -> list[tuple[str, SiteRow]]:
    """Draws sites of repeated blocks together.

    Returns:
        (name, row) pairs: `blocks.0.attention` to `blocks.29.attention`, where they are alike
        in all else, become `blocks 0-29 attention` with the first one's row.
    """
    groups: dict[object, _Group] = {}
    for row in rows:
        found = re.fullmatch(r"(.*?)\.(\d+)(?:\.(.*))?", row.name)
        prefix, suffix = (found[1], found[3] or "") if found else (row.name, "")
        refusals = tuple(sorted(row.not_applied.items()))
        key = (prefix, suffix, bool(found), row.kind, row.shape, row.transforms, refusals)
        group = groups.setdefault(key, _Group(row, prefix, suffix))
        if found:
            group.numbers.append(int(found[2]))
    return [(group.name, group.row) for group in groups.values()]


def sites_table(
    rows: Sequence[SiteRow], *, heading: str = "transforms", every: bool = False
) -> Table:
    """Makes the table of sites.

    Args:
        rows: the report's.
        heading: of the column of transforms.
        every: a line for each site instead of one for all blocks alike.
    """
    table = Table(title="Sites", title_justify="left")
    for name in ("site", "kind", "shape", heading, "not applied"):
        table.add_column(name, overflow="fold")
    for name, row in [(row.name, row) for row in rows] if every else collapse(rows):
        refused = "\n".join(f"{key}: {reason}" for key, reason in row.not_applied.items())
        table.add_row(name, row.kind, row.shape, ", ".join(row.transforms) or "none", refused)
    return table


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


def print_sites(console: Console, report: Report, *, heading: str, every: bool) -> None:
    """Prints the sites and what nearly was one."""
    console.print(sites_table(report.sites, heading=heading, every=every))
    misses = near_miss_lines(report)
    if misses:
        console.print("Near misses:")
        for line in misses:
            console.print(f"  {line}")


def print_summary(console: Console, report: Report, written: str, *, every: bool) -> None:
    """Prints the end of a compilation: sites, decisions, stages, audit, parity and sizes."""
    print_sites(console, report, heading="transforms", every=every)
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
