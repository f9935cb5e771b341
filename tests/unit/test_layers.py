"""The layers of design.md hold: a lower one never imports a higher one, nor its neighbour."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fptq_compiler

PACKAGE = Path(fptq_compiler.__file__).parent

SOURCE, MEMORY = "source_line", "memory"
"""Reads stack traces; hands freed memory back: both need the standard library only."""

RECORDS = {
    "progress", "recipe", "recipe_parts", "recipe_training", "closed_config", "report",
    "stage_clock", MEMORY, "inspection",
}
"""Plain modules that need no torch: what a stage is asked for, what it says it did and costs."""

MATHEMATICS = {"errors", "transforms", "quant"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    SOURCE: set(),
    **{record: {"errors", SOURCE, *RECORDS} for record in RECORDS},
    "transforms": {"errors"},
    "quant": {"errors"},
    "graph": MATHEMATICS | {SOURCE},
    "passes": MATHEMATICS | {"graph", MEMORY},
    "optimize": MATHEMATICS | {"graph"} | RECORDS,
    "lower": MATHEMATICS | {"graph", "runtime"} | RECORDS,  # runtime for its session file
    "runtime": {"errors"},
}
"""The layers that have neighbours; capture, driver and cli stand above them."""

ABOVE_DRIVER = {"cli", "__main__", "__init__"}


def _imports(path: Path) -> set[tuple[str, int]]:
    """The modules of this package that a file imports, each with its line."""
    found: set[tuple[str, int]] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {(alias.name, node.lineno) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} is a relative import"
            base = node.module or ""
            names = (
                {f"{base}.{alias.name}" for alias in node.names}
                if base == "fptq_compiler"
                else {base}
            )
            found |= {(name, node.lineno) for name in names}
    return {x for x in found if x[0].split(".")[0] == "fptq_compiler" and "." in x[0]}


def _layer(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


# rglob does not enter links, and in the repository passes/ is one.
FILES = sorted({*PACKAGE.rglob("*.py"), *(PACKAGE / "passes").glob("*.py")})


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_imports_only_lower_layers(path: Path) -> None:
    layer = _layer(path)
    for name, line in _imports(path):
        imported = name.split(".")[1]
        where = f"{path.relative_to(PACKAGE)}:{line} imports {name}"
        if layer in MAY_IMPORT:
            assert imported in MAY_IMPORT[layer] | {layer}, where
        elif layer not in ABOVE_DRIVER:
            assert imported != "cli", where
            assert imported != "driver" or layer == "driver", where


def test_the_layers_are_all_there() -> None:
    layers = {_layer(p) for p in FILES}
    assert set(MAY_IMPORT) <= layers
    assert {"driver", "cli"} <= layers


def test_the_mathematics_knows_neither_graph_nor_onnx() -> None:
    """transforms and quant need torch alone."""
    for path in FILES:
        if _layer(path) not in ("transforms", "quant"):
            continue
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert not name.startswith(("torch.fx", "onnx")), f"{path.name}: {name}"
