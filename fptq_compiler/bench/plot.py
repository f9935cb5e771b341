"""Decode latency over context length as a picture. matplotlib is an extra."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fptq_compiler.bench.result import Benchmark
from fptq_compiler.errors import LoweringError, RecipeError
from fptq_compiler.runtime.model_file import ModelFile

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES: Final = (".png", ".svg")
_MILLISECONDS: Final = 1e3
_INCHES: Final = (6.4, 4.0)
_DOTS_PER_INCH: Final = 150


def check_plot(path: Path, files: Sequence[ModelFile]) -> None:
    """Refuses a plot that could not be drawn, before anything is measured.

    Raises:
        RecipeError: another kind of file, no model that decodes, or no matplotlib.
    """
    if path.suffix.lower() not in SUFFIXES:
        message = f"--plot {path}: expected a name that ends in {' or '.join(SUFFIXES)}"
        raise RecipeError(message)
    if not any(file.signature.layers for file in files):
        message = f"--plot {path}: it shows decode steps, and no model here has a KV cache"
        raise RecipeError(message)
    if find_spec("matplotlib") is None:
        message = (
            "--plot needs matplotlib, which is not installed: pip install fptq-compiler[plot]"
        )
        raise RecipeError(message)


def plot_decode(result: Benchmark, path: Path) -> None:
    """Writes the picture of `decode_figure`.

    Args:
        result: with at least one decode point.
        path: ends in .png or .svg.

    Raises:
        LoweringError: the file cannot be written.
    """
    try:
        decode_figure(result).savefig(path, dpi=_DOTS_PER_INCH)
    except OSError as error:
        message = f"{path}: cannot write it: {error.strerror or error}"
        raise LoweringError(message) from error


def decode_figure(result: Benchmark) -> Figure:
    """Draws the median decode latency of each model that has a cache.

    A line a model over the context lengths, and around it a band from quartile to quartile.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=_INCHES, layout="constrained")
    axes = figure.add_subplot()
    points = [point for point in result.points if point.kind == "decode"]
    for label, model in result.models.items():
        mine = [point for point in points if label in point.seconds]
        if not mine:
            continue
        lengths = [point.length for point in mine]
        latencies = [point.latency(label) for point in mine]
        medians = [latency.median * _MILLISECONDS for latency in latencies]
        lows = [latency.low * _MILLISECONDS for latency in latencies]
        highs = [latency.high * _MILLISECONDS for latency in latencies]
        (line,) = axes.plot(lengths, medians, marker="o", label=f"{label}: {model.file}")
        axes.fill_between(lengths, lows, highs, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set_xlabel("context length (positions in the cache)")
    axes.set_ylabel(f"decode latency (ms a step, batch {result.settings.batch})")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
