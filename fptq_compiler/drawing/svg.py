"""The text of the drawing: SVG with its own colours, light and dark, and no script."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from itertools import pairwise
from typing import Final

from fptq_compiler.drawing.layout import (
    CHIP_HEIGHT,
    LINE,
    ROW_GAP,
    Layout,
    Place,
    chip_width,
    lay_out,
)
from fptq_compiler.drawing.scene import INPUT, BlockScene, Box, Chip, Run, Scene

MARGIN: Final = 28.0
FRAME: Final = 18.0
TITLE: Final = 24.0
BETWEEN: Final = 34.0
"""Between two runs; the residual stream goes through it."""

HUES: Final = {
    "residual": ("#1f5fbf", "#8ab8ff"), "prerope": ("#7a3fb5", "#cfa6ff"),
    "value": ("#b0306a", "#ff9ec7"), "updown": ("#1b7a4b", "#7fe0ac"),
    "hadamard": ("#9a5b00", "#ffc46b"), "scaling": ("#00717f", "#74dfee"),
}
"""Of each transform, on light and on dark ground; all have a contrast of 4.5 and more."""

LIGHT: Final = {
    "ground": "#ffffff", "frame": "#f6f7f9", "line": "#c9ced6", "text": "#1d2330",
    "faint": "#5b6472", "box": "#ffffff", "edge": "#8d96a5", "rail": "#4b5565",
    "attention": "#eef0ff", "mlp": "#eaf6ee", "linear": "#ffffff", "norm": "#f1f3f6",
    "embedding": "#fdf3e3", "unknown": "#fff1d6", "warning": "#8a4b00", "bits": "#e3e7ed",
}
DARK: Final = {
    "ground": "#14171d", "frame": "#1b2029", "line": "#3a4250", "text": "#e7eaf0",
    "faint": "#a3adbb", "box": "#222834", "edge": "#6f7a8b", "rail": "#b6c0cf",
    "attention": "#292c4a", "mlp": "#1f3529", "linear": "#222834", "norm": "#272d38",
    "embedding": "#3a3020", "unknown": "#43330f", "warning": "#ffcf7a", "bits": "#333b49",
}
FILLED: Final = ("attention", "mlp", "linear", "norm", "embedding")


def style() -> str:
    """The rules of the drawing, those for a reader who prefers dark ground last."""
    preferred = f"@media (prefers-color-scheme: dark) {{\n{_rules(DARK, 1)}\n}}"
    return f"{_rules(LIGHT, 0)}\n{preferred}"


def _rules(colour: dict[str, str], shade: int) -> str:
    """Rules for one ground."""
    lines = [
        ".drawing text{font:12px system-ui,-apple-system,'Segoe UI',Roboto,Helvetica,Arial,"
        f"sans-serif;fill:{colour['text']}}}",
        f".drawing .ground{{fill:{colour['ground']}}}",
        f".drawing .frame{{fill:{colour['frame']};stroke:{colour['line']}}}",
        f".drawing .bracket{{fill:none;stroke:{colour['faint']};stroke-dasharray:2 4}}",
        f".drawing .box{{fill:{colour['box']};stroke:{colour['line']}}}",
        f".drawing .edge{{fill:none;stroke:{colour['edge']};stroke-width:1.4}}",
        f".drawing .rail{{fill:none;stroke:{colour['rail']};stroke-width:3;stroke-linecap:round}}",
        f".drawing .add{{fill:{colour['ground']};stroke:{colour['rail']};stroke-width:2}}",
        f".drawing .unknown{{fill:{colour['unknown']};stroke:{colour['warning']};"
        "stroke-dasharray:5 3;stroke-width:1.5}",
        f".drawing .bits{{fill:{colour['bits']};stroke:none}}",
        f".drawing .refused{{fill:none;stroke:{colour['warning']};stroke-dasharray:3 2}}",
        ".drawing text.title{font-weight:600}",
        ".drawing text.name{font-size:20px;font-weight:650}",
        f".drawing text.faint{{fill:{colour['faint']};font-size:11.5px}}",
        f".drawing text.warning{{fill:{colour['warning']}}}",
        ".drawing text.chip{font-size:10.5px;font-weight:600}",
        f".drawing text.count{{font-size:15px;font-weight:650;fill:{colour['text']}}}",
        ".drawing text.plus{font-size:16px}",
    ]
    lines += [f".drawing .{kind}{{fill:{colour[kind]}}}" for kind in FILLED]
    for name, hues in HUES.items():
        hue = hues[shade]
        lines.append(f".drawing .{name}{{fill:{hue};fill-opacity:.16;stroke:{hue}}}")
        lines.append(f".drawing text.{name}{{fill:{hue};fill-opacity:1;stroke:none}}")
    return "\n".join(lines)


def draw(scene: Scene, *, links: bool = False) -> str:
    """The SVG of a scene.

    Args:
        scene: what to draw.
        links: make each box a link to `#run-block-box`, for a page that has such rows.
    """
    laid = [[lay_out(block) for block in run.blocks] for run in scene.runs]
    rail = max((x.rail for run in laid for x in run), default=0.0)
    inner = max((x.width - x.rail for run in laid for x in run), default=0.0) + rail
    repeated = any(run.count > 1 for run in scene.runs)
    width = max(inner + 2 * (MARGIN + FRAME) + (64.0 if repeated else 0.0), 560.0)
    parts: list[str] = []
    y = _header(scene, parts)
    x = MARGIN + FRAME + rail
    for number, (run, blocks) in enumerate(zip(scene.runs, laid, strict=True)):
        top = y
        for place, (block, layout) in enumerate(zip(run.blocks, blocks, strict=True)):
            anchor = f"{number}-{place}" if links else ""
            whole = run.name if len(run.blocks) == 1 else block.name
            y = _block(block, layout, whole, anchor, x, y, inner, parts)
            last = number == len(scene.runs) - 1 and place == len(run.blocks) - 1
            if not last:
                parts.append(_line([(x, y), (x, y + BETWEEN)], "rail"))
                y += BETWEEN
        if run.count > 1:
            parts += _count(run, MARGIN + inner + 2 * FRAME, top, y - BETWEEN)
    height = y + MARGIN
    title, words = escape(scene.title), escape(_description(scene))
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="drawing" role="img" '
        f'aria-labelledby="drawing-title drawing-words" width="{width:.0f}" '
        f'height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}">'
        f'<title id="drawing-title">{title}</title><desc id="drawing-words">{words}</desc>'
        f"<style>\n{style()}\n</style>"
        f'<rect class="ground" width="{width:.0f}" height="{height:.0f}"/>'
    )
    return "\n".join([head, *parts, "</svg>\n"])


def _header(scene: Scene, parts: list[str]) -> float:
    """Name, size and legend; gives where the drawing may begin."""
    parts.append(_text(MARGIN, MARGIN + 14, scene.title, "name", "start"))
    parts.append(_text(MARGIN, MARGIN + 36, scene.words, "faint", "start"))
    x, y = MARGIN, MARGIN + 52
    for number, (chip, words) in enumerate(scene.legend):
        if number == len(scene.legend) // 2:
            x, y = MARGIN, y + 24
        parts += _chip(chip, x, y)
        parts.append(_text(x + chip_width(chip.text) + 6, y + 12, words, "faint", "start"))
        x += 160.0
    return y + CHIP_HEIGHT + MARGIN


def _description(scene: Scene) -> str:
    """The drawing in one sentence, for those who do not see it."""
    runs = ", ".join(
        f"{run.name}" + (f" ({run.count} times)" if run.count > 1 else "") for run in scene.runs
    )
    return f"{scene.words}. From input to output: {runs}."


def _block(
    block: BlockScene, layout: Layout, name: str, anchor: str, x: float, y: float, inner: float,
    parts: list[str],
) -> float:
    """One framed block whose stream enters at (x, y); gives where it leaves."""
    height = TITLE + ROW_GAP + layout.height + ROW_GAP
    left = MARGIN
    parts.append(
        f'<rect class="frame" x="{left:.1f}" y="{y:.1f}" width="{inner + 2 * FRAME:.1f}" '
        f'height="{height:.1f}" rx="10"/>'
    )
    parts.append(_text(left + inner + 2 * FRAME - 12, y + 17, name, "title", "end"))
    dx, dy = x - layout.rail, y + TITLE + ROW_GAP
    parts += _edges(block, layout, dx, dy)
    if block.edges and any(a < 0 for a, _ in block.edges):
        parts.append(_line([(x, y), (x, dy - ROW_GAP)], "rail"))
    for given in block.gives:
        place = layout.places[given]
        start = (place.x + dx, place.y + dy + place.height / 2)
        parts.append(_line([start, (x, y + height)], "rail"))
    for number, (box, place) in enumerate(zip(block.boxes, layout.places, strict=True)):
        shape = _box(box, Place(place.x + dx, place.y + dy, place.width, place.height))
        title = "\n".join(f"{label}: {text}" for label, text in (("", box.title), *box.details))
        inside = f"<title>{escape(title.removeprefix(': '))}</title>{''.join(shape)}"
        if anchor and box.details:
            inside = f'<a href="#b{anchor}-{number}">{inside}</a>'
        parts.append(f"<g>{inside}</g>")
    return y + height


def _edges(block: BlockScene, layout: Layout, dx: float, dy: float) -> Iterator[str]:
    """Lines under the boxes; the stream is thick, and is left and entered from the side."""
    for (a, b), points in layout.paths.items():
        *through, (x, y) = [(px + dx, py + dy) for px, py in points]
        target = layout.places[b]
        sideways = abs(through[-1][0] - x) > target.width
        if (a, b) in layout.stream:
            yield _line([through[0], (x, y)], "rail")
        elif block.boxes[b].kind == "add" and sideways:
            half = target.width / 2 if through[-1][0] > x else -target.width / 2
            yield _curve([*through, (x + half, y)], into_side=True)
        else:
            leaves = a == INPUT or block.boxes[a].kind == "add"
            yield _curve([*through, (x, y - target.height / 2)], from_side=leaves and sideways)


def _curve(
    points: list[tuple[float, float]], *, into_side: bool = False, from_side: bool = False
) -> str:
    """A smooth line that leaves downwards and arrives from above, but where a side is named."""
    words = [f"M{points[0][0]:.1f} {points[0][1]:.1f}"]
    for number, ((ax, ay), (bx, by)) in enumerate(pairwise(points)):
        first, second = (ax, (ay + by) / 2), (bx, (ay + by) / 2)
        if from_side and number == 0:
            first = second = (bx, ay)
        elif into_side and number == len(points) - 2:
            first = second = (ax, by)
        words.append(
            f"C{first[0]:.1f} {first[1]:.1f} {second[0]:.1f} {second[1]:.1f} {bx:.1f} {by:.1f}"
        )
    return f'<path class="edge" d="{"".join(words)}"/>'


def _line(points: list[tuple[float, float]], kind: str) -> str:
    words = " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path class="{kind}" d="M{words}"/>'


def _box(box: Box, at: Place) -> Iterator[str]:
    if box.kind == "add":
        yield f'<circle class="add" cx="{at.x:.1f}" cy="{at.y:.1f}" r="{at.width / 2:.1f}"/>'
        yield _text(at.x, at.y + 5.5, "+", "plus")
        return
    if box.kind in ("quantizer", "online"):
        yield _rectangle(at, "bits", at.height / 2)
        if box.kind == "online":
            yield _rectangle(at, "hadamard", at.height / 2)
        yield _text(at.x, at.y + 4, box.title, "chip hadamard" if box.kind == "online" else "chip")
        return
    yield _rectangle(at, f"box {box.kind}", 7)
    y = at.y - at.height / 2 + 6 + LINE - 3
    yield _text(at.x, y, box.title, "title warning" if box.kind == "unknown" else "title")
    for line in box.lines:
        y += LINE
        yield _text(at.x, y, line, "faint")
    x = at.x - (sum(chip_width(c.text) + 4 for c in box.chips) - 4) / 2
    for chip in box.chips:
        yield from _chip(chip, x, y + 8)
        x += chip_width(chip.text) + 4


def _chip(chip: Chip, x: float, y: float) -> Iterator[str]:
    width = chip_width(chip.text)
    yield _rectangle(Place(x + width / 2, y + CHIP_HEIGHT / 2, width, CHIP_HEIGHT), chip.kind, 8)
    kind = {"bits": "chip", "refused": "chip warning"}.get(chip.kind, f"chip {chip.kind}")
    yield _text(x + width / 2, y + 11.8, chip.text, kind)
    if chip.kind == "refused":
        middle = y + CHIP_HEIGHT / 2
        yield _line([(x + 5, middle), (x + width - 5, middle)], "refused")


def _count(run: Run, x: float, top: float, bottom: float) -> Iterator[str]:
    """A bracket at the right of blocks that repeat, and how often."""
    yield f'<path class="bracket" d="M{x + 6:.1f} {top:.1f}h8V{bottom:.1f}h-8"/>'
    yield _text(x + 22, (top + bottom) / 2 + 5, f"× {run.count}", "count", "start")


def _rectangle(at: Place, kind: str, radius: float) -> str:
    return (
        f'<rect class="{kind}" x="{at.x - at.width / 2:.1f}" y="{at.y - at.height / 2:.1f}" '
        f'width="{at.width:.1f}" height="{at.height:.1f}" rx="{radius:.0f}"/>'
    )


def _text(x: float, y: float, words: str, kind: str, anchor: str = "middle") -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
        f"{escape(words)}</text>"
    )
