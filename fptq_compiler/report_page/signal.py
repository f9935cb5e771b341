"""Signal to quantisation noise of every quantiser, by stage."""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from fptq_compiler.report import Report
from fptq_compiler.report_page.elements import Cell, folded, paragraph, section, table
from fptq_compiler.report_page.figure import figure, finite, label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Stages = dict[str, dict[str, float]]


def signal_section(report: Report) -> str:
    """The plots, the median and least of each kind, and every place."""
    stages = report.sqnr_stages
    places = list(dict.fromkeys(place for found in stages.values() for place in found))
    if not places:
        return ""
    kinds: dict[str, list[str]] = {}
    for place in places:
        kinds.setdefault(place.partition(" of ")[0], []).append(place)
    middle = [
        (kind, len(members), *_of_kind(stages, members)) for kind, members in kinds.items()
    ]
    headings = [f"{stage}: {which}" for stage in stages for which in ("median", "least")]
    every = [(place, *(_decibel(found, place) for found in stages.values())) for place in places]
    panels = [partial(_panel, kind, members, stages) for kind, members in kinds.items()]
    return section(
        "Signal to quantisation noise",
        paragraph(
            "In decibel, of each quantiser by itself on what flows through the model in float. "
            "Plain rounding is the original with searched ranges, no transform, and no range of "
            "its own for the first token; what comes later has both where the recipe says so."
        ),
        figure("A point is a place, in the order of the model.", panels, columns=2, height=2.4),
        table(("quantised", "places", *headings), middle),
        folded("Each place", table(("place", *stages), every)),
    )


def _of_kind(stages: Stages, places: list[str]) -> list[Cell]:
    cells: list[Cell] = []
    for found in stages.values():
        values = [found[place] for place in places if place in found]
        cells += [median(values), min(values)] if values else ["", ""]
    return cells


def _decibel(found: dict[str, float], place: str) -> Cell:
    return found.get(place, "")


def _panel(kind: str, places: list[str], stages: Stages, axes: Axes) -> None:
    for stage, found in stages.items():
        values = finite([found.get(place, np.nan) for place in places])
        axes.plot(values, marker=".", markersize=3, linewidth=0.6, label=stage)
    axes.legend(fontsize="small")
    label(axes, kind, "place", "SQNR (dB)")
