"""The plot of decode latency, and what is refused before anything is measured."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fptq_compiler.bench.plot import check_plot, decode_figure, plot_decode
from fptq_compiler.bench.result import Benchmark, ModelRow, Point, Settings
from fptq_compiler.errors import LoweringError, RecipeError
from fptq_compiler.runtime.model_file import ModelFile, read_model_file
from tests.cached_model import write_cached_model


@pytest.fixture
def cached(tmp_path: Path) -> ModelFile:
    return read_model_file(write_cached_model(tmp_path / "cached.onnx", "int8"))


@pytest.fixture
def result() -> Benchmark:
    rows = {label: ModelRow(f"{label}.onnx", 1, 23, "CPU", 2, "int8") for label in ("A", "B")}
    points = (
        Point("prefill", 4, 4, {"A": (9.0,), "B": (9.0,)}),
        Point("decode", 8, 2, {"A": (0.001, 0.002, 0.003), "B": (0.004,)}),
        Point("decode", 32, 2, {"A": (0.005,), "B": (0.006,)}),
    )
    return Benchmark(Settings(batch=2), rows, points, {}, {})


def test_two_lines_with_quartile_bands(result: Benchmark) -> None:
    pytest.importorskip("matplotlib")
    (axes,) = decode_figure(result).axes
    assert axes.get_xlabel() == "context length (positions in the cache)"
    assert axes.get_ylabel() == "decode latency (ms a step, batch 2)"
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines) == ["A: A.onnx", "B: B.onnx"]
    assert lines["A: A.onnx"].get_xdata().tolist() == [8, 32]
    assert lines["A: A.onnx"].get_ydata().tolist() == pytest.approx([2.0, 5.0])
    assert lines["B: B.onnx"].get_ydata().tolist() == pytest.approx([4.0, 6.0])
    band = axes.collections[0].get_paths()[0].vertices
    assert sorted({round(y, 6) for x, y in band if x == 8}) == [1.5, 2.5]


def test_a_model_without_a_cache_has_no_line(result: Benchmark) -> None:
    pytest.importorskip("matplotlib")
    only = tuple(Point(p.kind, p.length, p.tokens, {"A": p.seconds["A"]}) for p in result.points)
    figure = decode_figure(Benchmark(result.settings, result.models, only, {}, {}))
    assert [line.get_label() for line in figure.axes[0].get_lines()] == ["A: A.onnx"]


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_both_kinds_of_file(result: Benchmark, tmp_path: Path, suffix: str, start: bytes) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"plot{suffix}"
    plot_decode(result, path)
    assert path.read_bytes().startswith(start)


def test_a_plot_that_cannot_be_written(result: Benchmark, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(LoweringError, match="cannot write it"):
        plot_decode(result, tmp_path / "nowhere" / "plot.png")


def test_another_kind_of_file_is_refused(cached: ModelFile) -> None:
    with pytest.raises(RecipeError, match=r"ends in \.png or \.svg"):
        check_plot(Path("plot.pdf"), [cached])


def test_without_matplotlib_it_says_what_to_install(
    cached: ModelFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RecipeError, match=r"pip install fptq-compiler\[plot\]"):
        check_plot(Path("plot.png"), [cached])


def test_without_a_cache_there_is_nothing_to_draw(tmp_path: Path) -> None:
    plain = read_model_file(write_cached_model(tmp_path / "m.onnx", None))
    with pytest.raises(RecipeError, match="no model here has a KV cache"):
        check_plot(Path("plot.svg"), [plain])
