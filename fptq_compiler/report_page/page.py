"""The page: what was found and done, then what it did to the numbers, then how it was done."""

from __future__ import annotations

from html import escape
from typing import Final

from fptq_compiler.drawing.page import STYLE
from fptq_compiler.report import Report
from fptq_compiler.report_page.curves import curves_section
from fptq_compiler.report_page.elements import paragraph
from fptq_compiler.report_page.figure import has_plots
from fptq_compiler.report_page.histograms import histograms_section
from fptq_compiler.report_page.outcome import (
    decisions_section,
    file_section,
    settings_section,
    sites_section,
    stages_section,
    summary_section,
)
from fptq_compiler.report_page.sensitivity import sensitivity_section
from fptq_compiler.report_page.signal import signal_section

_STYLE: Final = STYLE + """
main{display:block;max-width:64rem;margin:auto;padding:1.5rem}section{max-width:none;padding:0}
h1{font-size:1.3rem}summary{cursor:pointer}div,pre{overflow-x:auto}
.plot{background:#fff;color:#1d2330;margin:.6rem 0}.plot svg{width:100%;height:auto}
table{border-collapse:collapse;margin:.5rem 0}th{text-align:left}
th,td{padding:.15rem .7rem .15rem 0;vertical-align:top;border-bottom:1px solid #c9ced6}
.number{text-align:right;font-variant-numeric:tabular-nums}
"""
NO_PLOTS: Final = (
    "Plots need matplotlib, which is not installed (pip install fptq-compiler[plot]); the tables "
    "hold the same numbers."
)
NOT_MEASURED: Final = (
    "Signal and noise by stage, histograms and sensitivity were not measured: they need "
    "calibration tokens and further runs of the model."
)
_SECTIONS: Final = (
    summary_section, sites_section, decisions_section, curves_section, signal_section,
    histograms_section, sensitivity_section, file_section, stages_section, settings_section,
)


def page(report: Report) -> str:
    """One HTML page that needs no other file, no network and no script."""
    title = f"{report.origin}: report of fptq-compile"
    notes = [] if has_plots() else [paragraph(NO_PLOTS)]
    if not report.sqnr_stages:
        notes.append(paragraph(NOT_MEASURED))
    body = "\n".join([*notes, *(part(report) for part in _SECTIONS)])
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><main>\n"
        f"<h1>{escape(title)}</h1>\n{body}\n</main></body></html>\n"
    )
