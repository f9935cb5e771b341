"""Figures of matplotlib as SVG inside the page. matplotlib is an extra."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from html import escape
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH: Final = 9.0  # inches
_STYLE: Final = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "fptq",  # the same report gives the same page
    "text.parse_math": False,  # names may hold a dollar
    "font.size": 9.0,
}
Draw = Callable[["Axes"], None]


def has_plots() -> bool:
    """Whether matplotlib is there."""
    return find_spec("matplotlib") is not None


def figure(words: str, panels: Sequence[Draw], *, columns: int, height: float) -> str:
    """One figure with its caption; nothing without matplotlib or panels.

    Args:
        words: what it shows.
        panels: each draws into axes of its own.
        columns: panels side by side.
        height: of a row of panels, in inches.
    """
    if not panels or not has_plots():
        return ""
    import matplotlib
    from matplotlib.figure import Figure

    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # missing glyphs, gaps: a plot shows what it can
        made = Figure(figsize=(_WIDTH, height * rows), layout="constrained")
        for place, draw in enumerate(panels, start=1):
            draw(made.add_subplot(rows, columns, place))
        text = io.StringIO()
        made.savefig(text, format="svg", metadata={"Date": None})
    caption = f"<figcaption>{escape(words)}</figcaption>"
    return f'<figure class="plot">{_inside_html(text.getvalue())}{caption}</figure>'


def finite(values: ArrayLike) -> NDArray[np.float64]:
    """As an array, with gaps where a value is not finite."""
    found: NDArray[np.float64] = np.asarray(values, dtype=np.float64)
    return np.where(np.isfinite(found), found, np.nan)


def _inside_html(svg: str) -> str:
    """An SVG file without what only a file needs: declarations, name spaces, metadata."""
    drawing = svg[svg.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r' (xmlns(:\w+)?|version)="[^"]*"', "", drawing)
    return re.sub(r'<g id="[^"]*"', "<g", drawing)  # names that all figures share


def label(axes: Axes, title: str, x: str, y: str) -> None:
    """Title and axes of a panel."""
    axes.set_title(title, loc="left", fontsize="medium")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
