"""What compiling costs: the floor, the line through the layers, and that memory keeps to both."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
VOCABULARY = 512


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("benchmark_compile")


def a_report(seconds: float, anonymous: float) -> dict[str, Any]:
    stage = {"seconds": 1.0, "peak_rss_mb": anonymous + 100, "peak_anonymous_mb": anonymous}
    return {
        "stages": [stage, {**stage, "peak_anonymous_mb": 1.0}], "processor_seconds": seconds,
        "half_precision": 50_000_000, "block": 10_000_000, "size_after": 5_000_000,
    }


def test_the_floor_is_the_weights_and_three_blocks(tool: Any, tmp_path: Path) -> None:
    made = tool.synthetic(tmp_path, 2, 192, VOCABULARY)
    total, block = tool.half_precision_bytes(made)
    # q and o, k and v (one head of three), up, gate and down, two norms
    parameters = 2 * 192**2 + 2 * 192 * 64 + 3 * 192 * 512 + 2 * 192
    assert block == 2 * parameters
    assert total == 2 * (2 * parameters + VOCABULARY * 192 + 192)
    assert tool.half_precision_bytes(tmp_path / "model.gguf") == (0, 0)
    kept = (made / "model.safetensors").stat().st_mtime_ns
    assert (tool.synthetic(tmp_path, 2, 192, VOCABULARY) / "model.safetensors").stat(
    ).st_mtime_ns == kept
    found = tool.totals(a_report(7.0, 400.0))
    assert found["fp16 weights and 3 blocks, MB"] == 80.0
    assert (found["peak, MB"], found["anonymous peak, MB"]) == (500.0, 400.0)


def test_a_line_is_found_and_a_bend_is_named(tool: Any) -> None:
    layers = [4, 8, 16]
    straight = [a_report(3.0 + 2 * n, 300.0 + 8 * n) for n in layers]
    words, wrong = tool.growth(layers, straight)
    assert words[0] == "processor seconds: 3.0 and 2.00 a layer, within 0%"
    assert words[1] == "anonymous peak, MB: 300.0 and 8.00 a layer, within 0%"
    assert not wrong
    square = [a_report(float(n * n), 300.0 + 26 * n) for n in layers]
    _, wrong = tool.growth(layers, square)
    assert len(wrong) == 2
    assert wrong[0].startswith("processor seconds is no line in the layers")
    assert wrong[1] == "26 MB a layer, expected at most the 10 of its fp16 and 15 of its graph"


@pytest.mark.slow
def test_memory_grows_by_a_layer_in_half_precision_and_its_graph(
    tool: Any, tmp_path: Path
) -> None:
    """In processes of their own."""
    calibration = tmp_path / "ids.npy"
    np.save(calibration, np.random.default_rng(0).integers(0, VOCABULARY, (2, 256)))
    peaks, layers, width = [], (2, 8), 1152
    for count in layers:
        model = tool.synthetic(tmp_path, count, width, VOCABULARY)
        report = tool.measure(
            model, calibration, tmp_path, "4-8-8",
            "--recipe rtn --transforms auto --kv-cache --target ort-cpu --verify off",
        )
        peaks.append(tool.totals(report)["anonymous peak, MB"])
    slope = (peaks[1] - peaks[0]) / (layers[1] - layers[0])
    assert slope < report["block"] / 1e6 + tool.GRAPH
