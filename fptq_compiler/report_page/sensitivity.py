"""What the quantisers of each block cost by themselves."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from fptq_compiler.report import Report
from fptq_compiler.report_page.elements import folded, paragraph, section, table
from fptq_compiler.report_page.figure import figure, finite, label

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def sensitivity_section(report: Report) -> str:
    """The plot and its numbers, the most sensitive block first."""
    found = report.sensitivity
    if not found:
        return ""
    ranked = sorted(found.items(), key=lambda item: item[1], reverse=True)
    return section(
        "Sensitivity of the blocks",
        paragraph(
            "Jensen-Shannon divergence of the next-token distributions, in nats a token, when "
            "the quantisers of one block alone are at work; 0 is no difference, ln 2 the most."
        ),
        figure("In the order of the model.", [partial(_panel, found)], columns=1, height=2.6),
        folded("Each block", table(("block", "nats a token"), ranked)),
    )


def _panel(found: dict[str, float], axes: Axes) -> None:
    names = [name.removeprefix("blocks.") for name in found]
    axes.bar(range(len(names)), finite(list(found.values())))
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize="small")
    label(axes, "", "block", "nats a token")
