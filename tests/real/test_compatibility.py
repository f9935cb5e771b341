"""The README's table of families is what the tool finds; the tool tells failures as they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fptq_compiler.errors import UnsupportedModelError
from tests.real.architectures import ARCHITECTURES

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def tool(load_tool: Callable[[str], Any]) -> Any:
    return load_tool("compatibility")


@pytest.fixture
def table(tool: Any) -> Any:
    """The rows of the README's table, by family."""
    return tool.parse(tool.stands_in(REPOSITORY / "README.md"))


def test_the_readme_has_every_family_and_column(tool: Any, table: Any) -> None:
    assert list(table) == list(ARCHITECTURES)
    assert all(tuple(cells) == tool.COLUMNS for cells in table.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_readme_says_what_a_run_finds(tool: Any, table: Any, name: str) -> None:
    found = {column: replace(cell, figure=None) for column, cell in tool.row(name).items()}
    assert table[name] == found, "run python3 tools/compatibility.py --write"


def test_a_table_is_read_as_it_was_written(tool: Any) -> None:
    cells = dict.fromkeys(tool.COLUMNS, tool.Cell("yes"))
    rows = {
        "Plain": cells,
        "Odd": {**cells, "T_k": tool.Cell("0/2", "a norm (QK-norm) | it"), "KV cache":
                tool.Cell("no", "a norm (QK-norm) | it"), "T_v": tool.Cell("1/2", "1. other")},
    }
    text = tool.markdown(rows)
    assert tool.parse(text) == rows
    assert text.count("a norm (QK-norm)") == 1  # one footnote for both
    assert "| 0/2 (1) | 1/2 (2) |" in text


def test_a_failure_is_the_cell_s_reason(tool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        message = 'linear_7 is odd. File "/home/me/secret/model.py", line 3, in forward\nMend it.'
        raise UnsupportedModelError(message)

    monkeypatch.setattr(tool, "exported", refuse)
    cells = tool.row("Llama")
    assert cells["captured"] == tool.Cell("no", "linear is odd. model.py in forward Mend it.")
    assert {cells[column].text for column in tool.COLUMNS[1:]} == {"–"}


def test_a_wrong_transform_would_show(tool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def transform(program: Any, recipe: Any, ids: Any, report: Any, progress: Any) -> None:
        report.preserved.update({"insert_value": 3e-4, "fold_transforms": 1e-7})

    monkeypatch.setattr(tool, "transform", transform)
    cells = tool.row("Llama")
    assert cells["preserved"] == tool.Cell("no", "relative error 3e-04 in float64", 3e-4)
    assert cells["T_v"] == tool.Cell("0/2", "no site has it")
    assert cells["W4A8 parity"].text == "–"


def test_one_family_is_run_and_written_as_json(tool: Any, tmp_path: Path) -> None:
    path = tmp_path / "cells.json"
    shown = CliRunner().invoke(tool.main, ["--only", "ViT", "--json", str(path)])
    assert shown.exit_code == 0, shown.output
    assert "| ViT | yes | 2 + 2" in shown.output
    assert json.loads(path.read_text())["ViT"]["captured"]["text"] == "yes"
    unknown = CliRunner().invoke(tool.main, ["--only", "Lama"])
    assert unknown.exit_code == 1
    assert "no family 'Lama'" in unknown.output
