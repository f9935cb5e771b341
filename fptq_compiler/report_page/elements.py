"""The few elements of the page. They escape text; what is named `markup` is HTML already."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Cell = str | int | float


def section(title: str, *markup: str) -> str:
    """A part of the page; an empty one where there is nothing to say."""
    body = "\n".join(part for part in markup if part)
    return f"<section><h2>{escape(title)}</h2>\n{body}\n</section>" if body else ""


def paragraph(text: str) -> str:
    """One paragraph."""
    return f"<p>{escape(text)}</p>"


def terms(values: Mapping[str, Cell]) -> str:
    """Names and what they stand for; nothing where there are none."""
    rows = "".join(f"<dt>{escape(n)}</dt><dd>{escape(shown(v))}</dd>" for n, v in values.items())
    return f"<dl>{rows}</dl>" if rows else ""


def bullets(lines: Sequence[str]) -> str:
    """One line an item; nothing where there are none."""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def table(headings: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Numbers stand to the right; nothing where there are no rows."""
    if not rows:
        return ""
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<div><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>"


def folded(summary: str, markup: str) -> str:
    """What opens with a click; nothing where nothing is in it."""
    return f"<details><summary>{escape(summary)}</summary>{markup}</details>" if markup else ""


def verbatim(text: str) -> str:
    """Text with its lines as they are."""
    return f"<pre>{escape(text)}</pre>" if text else ""


def shown(value: Cell) -> str:
    """A number with at most four significant digits, or the text itself."""
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else str(value).replace("inf", "∞")
    return f"{value:,}" if isinstance(value, int) else value


def _cell(value: Cell) -> str:
    kind = "" if isinstance(value, str) else ' class="number"'
    return f"<td{kind}>{escape(shown(value))}</td>"
