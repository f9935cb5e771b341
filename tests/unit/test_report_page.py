"""The page of a report: its parts, its plots, and that it needs nothing but itself."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fptq_compiler.errors import LoweringError, RecipeError
from fptq_compiler.inspection import Unrecognised
from fptq_compiler.report import AuditRow, Histogram, Report, SiteRow, StageRow
from fptq_compiler.report_page.page import NO_PLOTS, NOT_MEASURED, page
from fptq_compiler.report_page.write import check_reports, write_report
from fptq_compiler.source_line import SourceLine

EVIL = "<script>alert('$x')</script>"
PLOTS = 4  # curves, signal, histograms, sensitivity


def whole_report(name: str = "blocks.0") -> Report:
    """A report with something in every part; `name` stands where a model's names stand."""
    wide = Histogram(-8.0, 2.0, (1, 0, 0, 5, 9), 1.5, 30.0)
    narrow = Histogram(-2.0, 2.0, (1, 2, 6, 2, 1), 1.0, 2.5)
    return Report(
        name,
        recipe='name = "fptquant"\nbits = "4-8-8"\n\n[training]\nevaluate_every = 2\n',
        sites=[SiteRow(name, "mlp", f"width 8 {name}", ("updown",), {"hadamard": name})],
        near_misses=[name, name],
        unrecognised=[
            Unrecognised("block", name, name, "no norm", SourceLine("m.py", 3, name), "float")
        ],
        stages=[StageRow("capture", 1.5, 20.0, 10.0), StageRow(name, 0.5, 30.0)],
        curves={
            "value.a": [2.0, 1.0, 0.5], f"value.{name}": [4.0, 3.0, float("inf")],
            "end to end": [0.4, 0.3, 0.2], "end to end, held out": [0.5, 0.25, 0.2],
        },
        preserved={"fold_norms": 1e-15},
        sqnr_stages={
            "plain rounding": {f"weight of {name}": 18.25, f"input of {name}": 9.5},
            "after transforms": {f"weight of {name}": 19.5, f"input of {name}": 31.0},
            "after training": {f"weight of {name}": float("inf"), "keys of x": 40.0},
        },
        histograms={f"input of {name}": {"plain rounding": wide, "after training": narrow}},
        sensitivity={"embedding": 0.001, name: 0.0625},
        audit=[AuditRow("linear weights", "INT4", "INT8", 2, 2_000_000)],
        size_before=8_000_000,
        size_after=3_000_000,
        parity={"worst relative": 3.2e-6, "fused": 7},
        decisions=[f"calibrated on {name}"],
        perplexity={"the file": 30.5},
        online_operations=1_474_560,
        tokens_per_second=96.25,
    )


class Reader(HTMLParser):
    """The text of a page; every element that is opened must be closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture
def no_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.mark.usefixtures("no_matplotlib")
def test_every_part_is_there_without_matplotlib() -> None:
    text = page(whole_report())
    reader = read(text)
    shown = "|".join(reader.words)
    titles = re.findall("<h2>(.*?)</h2>", text)
    assert titles == [
        "In short", "Sites", "Decisions", "Learning curves", "Signal to quantisation noise",
        "What enters the linear layers", "Sensitivity of the blocks", "Written file", "Stages",
        "Settings",
    ]
    for words in (
        "4-8-8", "hadamard: blocks.0", "m.py:3 in blocks.0", "calibrated on blocks.0",
        "end to end, held out", "18.25", "∞", "30", "0.0625", "INT8", "NO", "3.2e-06", "1e-15",
        "perplexity of the file", "1,474,560", "96.25",
        "capture", "evaluate_every = 2", "onnxruntime", NO_PLOTS,
    ):
        assert words in shown, words
    assert NOT_MEASURED not in shown
    assert "svg" not in reader.tags


def test_plots_stand_in_the_page() -> None:
    pytest.importorskip("matplotlib")
    text = page(whole_report())
    reader = read(text)
    assert reader.tags.count("svg") == PLOTS
    shown = "|".join(reader.words)
    assert NO_PLOTS not in shown
    for words in ("value, 2 maps", "held out", "SQNR (dB)", "value / rms", "nats a token"):
        assert words in shown, words
    assert text == page(whole_report())  # the same report, the same page


def test_the_page_needs_nothing_else() -> None:
    pytest.importorskip("matplotlib")
    text = page(whole_report())
    for words in ("http", "src=", "@import", "url(http", "<script", "<link"):
        assert words not in text, words
    assert set(re.findall(r'href="(.)', text)) <= {"#"}
    assert len(text) < 200_000


def test_names_are_escaped() -> None:
    pytest.importorskip("matplotlib")
    text = page(whole_report(EVIL))
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "script" not in read(text).tags


def test_what_was_not_measured_is_said() -> None:
    text = page(Report("toy"))
    assert NOT_MEASURED in "|".join(read(text).words)
    assert "Signal to quantisation noise" not in text


def test_json_holds_the_same_numbers() -> None:
    report = whole_report()
    found = json.loads(report.to_json())
    assert found["sensitivity"] == report.sensitivity
    assert found["sqnr_stages"]["plain rounding"] == report.sqnr_stages["plain rounding"]
    assert found["sqnr_stages"]["after training"]["weight of blocks.0"] == "inf"
    spread = found["histograms"]["input of blocks.0"]["plain rounding"]
    again = Histogram(**{**spread, "counts": tuple(spread["counts"])})
    assert again == report.histograms["input of blocks.0"]["plain rounding"]


def test_the_peak_of_a_histogram() -> None:
    assert Histogram(-8.0, 2.0, (1,), 2.0, 3.0).peak == 4.0
    assert Histogram(0.0, 0.0, (1,), 0.0, 0.0).peak == 0.0


def html_begins(text: str) -> bool:
    return text.startswith("<!DOCTYPE html>")


def json_begins(text: str) -> bool:
    return json.loads(text)["origin"] == "toy"


@pytest.mark.parametrize(
    ("name", "begins"), [("r.html", html_begins), ("R.HTML", html_begins), ("r.json", json_begins)]
)
def test_the_ending_says_the_form(
    tmp_path: Path, name: str, begins: Callable[[str], bool]
) -> None:
    path = tmp_path / name
    check_reports([path])
    write_report(Report("toy"), path)
    assert begins(path.read_text(encoding="utf-8"))
    assert list(tmp_path.iterdir()) == [path]


def test_another_ending_or_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"--report .*r\.txt: expected .* \.html or \.json"):
        check_reports([tmp_path / "r.json", tmp_path / "r.txt"])
    with pytest.raises(RecipeError, match="there is no folder"):
        check_reports([tmp_path / "none" / "r.html"])


@pytest.mark.usefixtures("no_matplotlib")
def test_a_page_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "r.html"
    folder.mkdir()
    with pytest.raises(LoweringError, match="cannot write it"):
        write_report(Report("toy"), folder)
    assert list(tmp_path.iterdir()) == [folder]
