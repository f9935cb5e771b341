"""The command that times a model with and without its online parts, on files that are there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.cached_model import write_cached_model


@pytest.fixture
def tool(load_tool: Callable[[str], Any]) -> Any:
    return load_tool("benchmark_overhead")


def test_every_variant_is_timed_at_every_length(tool: Any, tmp_path: Path) -> None:
    folder, found = tmp_path / "files", tmp_path / "overhead.json"
    folder.mkdir()
    for name in tool.VARIANTS:
        write_cached_model(folder / f"4-8-8-{name}.onnx", "int8")
    words = [
        str(folder), "--folder", str(folder), "--prompt-lengths", "2,5", "--decode-at", "3",
        "--threads", "1", "--repeats", "2", "--json", str(found),
    ]
    shown = CliRunner().invoke(tool.main, words)
    assert shown.exit_code == 0, shown.output
    whole = json.loads(found.read_text())
    assert [(p["kind"], p["length"]) for p in whole["points"]] == [
        ("prefill", 2), ("prefill", 5), ("decode", 3),
    ]
    assert all(list(p["seconds"]) == list(tool.VARIANTS) for p in whole["points"])
    nodes = whole["nodes"]["both"]
    assert nodes == whole["nodes"]["without"]  # the files are equal
    assert nodes["prefill"] > 0


def test_what_cannot_be_compiled_says_why(tool: Any, tmp_path: Path) -> None:
    nothing = tmp_path / "nothing.pt"
    nothing.write_bytes(b"")
    shown = CliRunner().invoke(tool.main, [str(nothing), "--folder", str(tmp_path / "files")])
    assert shown.exit_code == 3
    assert "error: " in shown.output
