"""What `fptq-inspect` prints: one paragraph for each kind of site, and what was not recognised."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fptq_compiler.cli.collapse import collapse, without_numbers
from fptq_compiler.cli.tables import stdout_console
from fptq_compiler.drawing.scene import SYMBOLS
from fptq_compiler.inspection import InspectedSite, Inspection, Unrecognised, Verdict


def print_inspection(console: Console, found: Inspection, *, every: bool) -> None:
    """Prints the model's size, its sites, what was not recognised, and the near misses.

    Args:
        console: of stdout.
        found: what there is to say.
        every: a paragraph for each site instead of one for all blocks alike.
    """
    cost = found.export
    console.print(
        f"{found.model}: {cost.parameters / 1e6:,.1f} M parameters, {cost.bytes / 1e6:,.1f} MB; "
        f"capturing it took {cost.seconds:.1f} s and gave {cost.nodes:,} nodes"
    )
    for name, site in _paragraphs(found.sites, every):
        console.print()
        _print_site(console, name, site)
    if found.unrecognised:
        console.print()
        print_unrecognised(console, found.unrecognised)
    _print_misses(console, found)


def print_unrecognised(console: Console, rows: Sequence[Unrecognised]) -> None:
    """Prints the table of the parts that no pass understood."""
    table = Table(title="NOT RECOGNISED", title_justify="left", title_style="bold red")
    for heading in ("part", "why", "what it means"):
        table.add_column(heading, overflow="fold", ratio=1)
    counts: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        where = f" ({row.source})" if row.source is not None else ""
        key = row.kind, f"{without_numbers(row.reason)}{where}", row.meaning
        counts.setdefault(key, []).append(row.place)
    for (kind, reason, meaning), places in counts.items():
        shown = ", ".join(places[:3]) + (f" and {len(places) - 3} more" if places[3:] else "")
        table.add_row(f"{kind}: {shown}", reason, meaning)
    console.print(table)


def stderr_console() -> Console:
    """Gives the console for warnings, as wide as that for results."""
    console = Console(stderr=True, markup=False, highlight=False)
    if not console.is_terminal:
        console.width = stdout_console().width
    return console


def _paragraphs(sites: Sequence[InspectedSite], every: bool) -> list[tuple[str, InspectedSite]]:
    if every:
        return [(site.name, site) for site in sites]
    return [
        (f"{group.name} (× {group.count})" if group.count > 1 else group.name, group.row)
        for group in collapse(sites, _alike)
    ]


def _alike(site: InspectedSite) -> Hashable:
    """What must be equal for two sites to share a paragraph: all but names and numbers."""
    verdicts = tuple(
        (name, v.applies, without_numbers(v.reason), v.source)
        for name, v in site.transforms.items()
    )
    return site.kind, site.words, site.source, verdicts, len(site.quantizers)


def _print_site(console: Console, name: str, site: InspectedSite) -> None:
    console.print(Text(name, style="bold"))
    lines = Table.grid(padding=(0, 1))
    lines.add_column(no_wrap=True)
    lines.add_column(overflow="fold")
    source = f", written at {site.source}" if site.source is not None else ""
    title = "" if site.name == site.kind else f"{site.kind}: "
    console.print(Padding(f"{title}{site.words}{source}", (0, 0, 0, 2), expand=False))
    for transform, verdict in site.transforms.items():
        words = f"{SYMBOLS[transform]} {transform}"
        if verdict.applies:
            lines.add_row(Text("yes", style="green"), words)
        else:
            lines.add_row(Text("no", style="yellow"), f"{words}: {_why(verdict)}")
    console.print(Padding(lines, (0, 0, 0, 2), expand=False))


def _why(verdict: Verdict) -> str:
    where = [f"at {verdict.node}"] if verdict.node else []
    if verdict.source is not None:
        where.append(str(verdict.source))
    return f"{verdict.reason} ({', '.join(where)})" if where else verdict.reason


def _print_misses(console: Console, found: Inspection) -> None:
    """Prints the near misses that no site and no unrecognised part tells already."""
    told = {v.reason for site in found.sites for v in site.transforms.values()}
    told |= {row.reason for row in found.unrecognised}
    counts: dict[str, int] = {}
    for miss in found.near_misses:
        if miss.reason not in told:
            where = f" ({miss.source})" if miss.source is not None else ""
            words = without_numbers(f"{miss.what} at {miss.node}: {miss.reason}{where}")
            counts[words] = counts.get(words, 0) + 1
    if counts:
        console.print("\nNear misses:")
        for words, count in counts.items():
            shown = f"{words} (× {count})" if count > 1 else words
            console.print(Padding(shown, (0, 0, 0, 2), expand=False))
