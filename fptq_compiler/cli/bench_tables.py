"""Tables of a benchmark: the models, latency and speed-up, and the kernels that ran."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from rich.console import Console
from rich.table import Table

from fptq_compiler.bench.result import Benchmark, KernelRow, Kind, ModelRow, Point, Spread

_MILLISECONDS: Final = 1e3
_MEGABYTE: Final = 1e6
_SMALL: Final = 0.01
"""Share of a call's time below which kernels are drawn together; the JSON has them all."""


def print_benchmark(console: Console, result: Benchmark) -> None:
    """Prints all tables and how to read them."""
    console.print(models_table(result))
    console.print(latency_table(result))
    if len(result.models) > 1:
        console.print(
            "Medians, with quartiles in brackets. Quote the speed-up: it is taken within each "
            "round, and milliseconds depend on what else the machine does."
        )
    else:
        console.print(
            "Medians, with quartiles in brackets. Milliseconds depend on what else the machine "
            "does: for a figure to quote, compare with another model by --vs."
        )
    console.print(kernels_table(result, "prefill", max(result.settings.prompt_lengths)))
    if any(model.cache for model in result.models.values()):
        console.print(kernels_table(result, "decode", max(result.settings.decode_at)))


def models_table(result: Benchmark) -> Table:
    """Makes the table of models: what they are and the memory that they take."""
    table = Table(title="Models", title_justify="left")
    for name in ("", "file", "KV cache", "runs on"):
        table.add_column(name, overflow="fold")
    for name in ("file, MB", "session holds, MB", "at its peak, MB"):
        table.add_column(name, justify="right")
    for label, model in result.models.items():
        cache = model.cache or "none: prefill only"
        table.add_row(label, model.file, cache, _short(model.provider), *_sizes(model))
    return table


def latency_table(result: Benchmark) -> Table:
    """Makes the table of calls, one a line, and the speed-up where there are two models."""
    table = Table(title=f"Latency, batch {result.settings.batch}", title_justify="left")
    table.add_column("call")
    for label in result.models:
        table.add_column(f"{label}, ms", justify="right")
        table.add_column(f"{label}, tokens/s", justify="right")
    if len(result.models) > 1:
        table.add_column("A is faster by", justify="right")
    for point in result.points:
        cells = [f"{point.kind} {point.length:,}"]
        for label in result.models:
            cells += _latency(point, label)
        ratio = point.speed_up()
        if ratio is not None:
            cells.append(_spread(ratio))
        table.add_row(*cells)
    return table


def kernels_table(result: Benchmark, kind: Kind, length: int) -> Table:
    """Makes the table of the kernels that ran in one call of each model, slowest first.

    Args:
        result: of one model or two.
        kind: of the call.
        length: of the call, for the title.
    """
    caption = "Profiling itself costs each node some microseconds."
    table = Table(
        title=f"Kernels, {kind} {length:,}",
        title_justify="left",
        caption=caption,
        caption_justify="left",
    )
    for name in ("", "kernel", "runs on"):
        table.add_column(name)
    for name in ("nodes", "ms", "share"):
        table.add_column(name, justify="right")
    for label, model in result.models.items():
        rows = model.kernels.get(kind, ())
        total = sum(row.seconds for row in rows)
        for row in _small_together(rows, total):
            table.add_row(
                label,
                row.kernel,
                _short(row.provider),
                f"{row.count:,}",
                f"{row.seconds * _MILLISECONDS:,.2f}",
                f"{row.seconds / total:.0%}",
            )
        table.add_section()
    return table


def _small_together(rows: Sequence[KernelRow], total: float) -> list[KernelRow]:
    """Gives the rows of at least a hundredth of the total, then the others as one."""
    large = [row for row in rows if row.seconds >= _SMALL * total]
    small = [row for row in rows if row.seconds < _SMALL * total]
    if not small:
        return large
    nodes, seconds = sum(row.count for row in small), sum(row.seconds for row in small)
    return [*large, KernelRow(f"{len(small)} others", "", nodes, seconds)]


def _latency(point: Point, label: str) -> tuple[str, str]:
    """Milliseconds and tokens a second of one model, or nothing where it was not measured."""
    if label not in point.seconds:
        return "no cache", ""
    return _spread(point.latency(label), _MILLISECONDS), f"{point.tokens_per_second(label):,.1f}"


def _spread(value: Spread, factor: float = 1.0) -> str:
    """A median with its quartiles, to three figures or whole: `2.31 (2.20-2.44)`."""
    decimals = 2 if value.median * factor < 10 else 1 if value.median * factor < 100 else 0
    low, median, high = (
        f"{x * factor:,.{decimals}f}" for x in (value.low, value.median, value.high)
    )
    return f"{median} ({low}-{high})"


def _sizes(model: ModelRow) -> tuple[str, str, str]:
    """Megabytes of 10^6 bytes: the file, what its session holds, and its peak."""
    file = f"{model.bytes / _MEGABYTE:,.1f}"
    if model.memory is None:
        return file, "not known here", "not known here"
    held, peak = model.memory.held / _MEGABYTE, model.memory.peak / _MEGABYTE
    return file, f"{held:,.1f}", f"{peak:,.1f}"


def _short(provider: str) -> str:
    return provider.removesuffix("ExecutionProvider")
