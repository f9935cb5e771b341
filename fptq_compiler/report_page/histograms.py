"""How the values that enter linear layers are spread, before and after the transforms."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np

from fptq_compiler.report import Histogram, Report
from fptq_compiler.report_page.elements import paragraph, section, table
from fptq_compiler.report_page.figure import figure, label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LONGEST: Final = 44  # letters of a title


def histograms_section(report: Report) -> str:
    """The plots, and how heavy the tails are."""
    if not report.histograms:
        return ""
    rows = [
        (place, stage, spread.kurtosis, spread.peak, spread.rms)
        for place, stages in report.histograms.items() for stage, spread in stages.items()
    ]
    panels = [partial(_panel, place, stages) for place, stages in report.histograms.items()]
    words = "Density of the values over their root mean square; wide and low tails cost bits."
    return section(
        "What enters the linear layers",
        paragraph("The places with the heaviest tails under plain rounding, by kurtosis."),
        figure(words, panels, columns=2, height=2.2),
        table(("place", "stage", "kurtosis", "largest / rms", "rms"), rows),
    )


def _panel(place: str, stages: dict[str, Histogram], axes: Axes) -> None:
    for stage, spread in stages.items():
        counts = np.asarray(spread.counts, dtype=np.float64)
        edges = np.linspace(spread.low, spread.high, len(counts) + 1) / (spread.rms or 1.0)
        width = float(edges[1] - edges[0]) or 1.0
        axes.stairs(counts / counts.sum() / width, edges, label=stage)
    axes.set_yscale("log")
    axes.legend(fontsize="small")
    title = place if len(place) <= _LONGEST else f"…{place[-_LONGEST:]}"
    label(axes, title, "value / rms", "density")
