"""The file of a drawing: an SVG, or an HTML page with the drawing and what stands behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Final

from fptq_compiler.drawing.scene import BlockScene, Run, Scene
from fptq_compiler.drawing.svg import draw
from fptq_compiler.report import check_new_file, write_text_whole

STYLE: Final = """
:root{color-scheme:light dark}
body{margin:0;font:14px/1.45 system-ui,-apple-system,'Segoe UI',Roboto,Helvetica,Arial,sans-serif;
background:#fff;color:#1d2330}
main{display:flex;flex-wrap:wrap;align-items:flex-start;gap:1rem}
figure{margin:0;max-width:100%;overflow-x:auto}
section{flex:1 1 24rem;max-width:60rem;padding:1.5rem;box-sizing:border-box}
h1{font-size:1.1rem}h2{font-size:1rem;margin-top:1.6rem}
dl{margin:0 0 .4rem;padding:.45rem .7rem;border-left:3px solid #c9ced6;
display:grid;grid-template-columns:max-content 1fr;gap:0 .8rem}
dl:target{border-left-color:#1f5fbf;background:#eaf1fd}
dt{color:#5b6472}dd{margin:0;overflow-wrap:anywhere}
dl>dt:first-child,dl>dd:nth-child(2){font-weight:600;color:inherit}
a{text-decoration:none}a:focus-visible{outline:2px solid #1f5fbf}
@media (prefers-color-scheme: dark){body{background:#14171d;color:#e7eaf0}dt{color:#a3adbb}
dl{border-left-color:#3a4250}dl:target{border-left-color:#8ab8ff;background:#1d2940}}
"""


def page(scene: Scene) -> str:
    """One HTML page without scripts: the drawing, and what a click on a box leads to."""
    sections = "\n".join(_section(number, run) for number, run in enumerate(scene.runs))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(scene.title)}</title><style>{STYLE}</style></head><body><main>\n"
        f"<figure>{draw(scene, links=True)}</figure>\n"
        f"<section><h1>What stands behind each box</h1>\n{sections}</section>\n"
        "</main></body></html>\n"
    )


def _section(number: int, run: Run) -> str:
    return "\n".join(
        _details(f"{number}-{place}", run if len(run.blocks) == 1 else None, block)
        for place, block in enumerate(run.blocks)
    )


def _details(anchor: str, run: Run | None, block: BlockScene) -> str:
    name = f"{run.name} × {run.count}" if run is not None and run.count > 1 else block.name
    lists = []
    for number, box in enumerate(block.boxes):
        if box.details:
            words = [(box.kind, box.title), *((label, text) for label, text in box.details)]
            terms = "".join(
                f"<dt>{escape(label)}</dt><dd>{escape(text)}</dd>" for label, text in words
            )
            lists.append(f'<dl id="b{anchor}-{number}">{terms}</dl>')
    return f"<h2>{escape(name)}</h2>\n" + "\n".join(lists)


FORMS: Final[Mapping[str, Callable[[Scene], str]]] = {".html": page, ".svg": draw}


def check_form(path: Path) -> None:
    """Refuse a file name that says neither of the two forms, before anything is drawn.

    Raises:
        RecipeError: another ending, or a folder that is not there.
    """
    check_new_file("--graph", path, FORMS)


def write_drawing(scene: Scene, path: Path) -> None:
    """Write the drawing in the form that the name's ending says, whole or not at all.

    Raises:
        LoweringError: the file cannot be written.
    """
    write_text_whole(path, FORMS[path.suffix.lower()](scene))
