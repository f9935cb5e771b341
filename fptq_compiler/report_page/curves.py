"""Learning curves: one of its own for each training, and one for all maps of a kind."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np

from fptq_compiler.recipe import Recipe
from fptq_compiler.report import Report
from fptq_compiler.report_page.elements import folded, section, table
from fptq_compiler.report_page.figure import figure, finite, label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HELD_OUT: Final = ", held out"
Curves = dict[str, list[float]]


def curves_section(report: Report) -> str:
    """The plots, and each curve's first, least and last loss."""
    curves = {name: losses for name, losses in report.curves.items() if losses}
    rows = [
        (name, len(losses), losses[0], min(losses), losses[-1]) for name, losses in curves.items()
    ]
    every = Recipe.from_toml(report.recipe, "report").training.evaluate_every
    panels = [
        partial(_panel, kind, members, every) for kind, members in _by_kind(curves).items()
    ]
    words = (
        "Loss by step. Of several maps of a kind the median and the range, each relative to its "
        "first loss."
    )
    return section(
        "Learning curves",
        figure(words, panels, columns=2, height=2.4),
        folded("Each curve", table(("curve", "points", "first", "least", "last"), rows)),
    )


def _by_kind(curves: Curves) -> dict[str, Curves]:
    """Curves by what stands before the first point of their name; held-out ones with theirs."""
    kinds: dict[str, Curves] = {}
    for name, losses in curves.items():
        kind = name.removesuffix(HELD_OUT).partition(".")[0]
        kinds.setdefault(kind, {})[name] = losses
    return kinds


def _panel(kind: str, curves: Curves, every: int, axes: Axes) -> None:
    trained = {name: losses for name, losses in curves.items() if not name.endswith(HELD_OUT)}
    if len(trained) > 1:
        _band(trained, axes)
        label(axes, f"{kind}, {len(trained)} maps", "step", "loss over the first")
        return
    longest = max(map(len, curves.values()))
    for name, losses in curves.items():
        steps = np.arange(len(losses))
        if name.endswith(HELD_OUT):  # looked at every few steps, and at the end
            steps = np.minimum(steps * every, longest)
            axes.plot(steps, finite(losses), marker="o", markersize=3, label="held out")
        else:
            axes.plot(steps, finite(losses), linewidth=0.8, label="each step")
    if len(curves) > 1:
        axes.legend()
    label(axes, kind, "step", "loss")


def _band(curves: Curves, axes: Axes) -> None:
    """The median over the curves, and from the least to the largest."""
    shortest = min(map(len, curves.values()))
    losses = finite([losses[:shortest] for losses in curves.values()])
    relative = losses / losses[:, :1]
    steps = np.arange(shortest)
    (line,) = axes.plot(steps, np.nanmedian(relative, axis=0))
    low, high = np.nanmin(relative, axis=0), np.nanmax(relative, axis=0)
    axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
