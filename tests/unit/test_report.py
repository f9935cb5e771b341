from __future__ import annotations

import json
import mmap
import time
from pathlib import Path

import pytest

from fptq_compiler.errors import LoweringError
from fptq_compiler.progress import SilentProgress, track
from fptq_compiler.report import AuditRow, Report, SiteRow, StageRow
from fptq_compiler.stage_clock import resident_bytes


def filled_report() -> Report:
    report = Report("toy.pt", recipe='name = "rtn"\n', seed=3, size_before=10, size_after=4)
    report.sites.append(
        SiteRow("blocks.0.mlp", "mlp", "width 8", ("updown",), {"hadamard": "no order 7"})
    )
    report.stages.append(StageRow("capture", 1.5, 20.0))
    report.curves["local"] = [2.0, float("inf"), float("nan")]
    report.audit.append(AuditRow("linear", "INT4", "INT8", 2, 64))
    report.parity["worst relative"] = 1e-6
    return report


def test_json_holds_everything_and_is_strict() -> None:
    def refuse(constant: str) -> float:
        raise AssertionError(constant)

    table = json.loads(filled_report().to_json(), parse_constant=refuse)
    assert table["origin"] == "toy.pt"
    assert table["sites"][0]["transforms"] == ["updown"]
    assert table["sites"][0]["not_applied"] == {"hadamard": "no order 7"}
    assert table["curves"] == {"local": [2.0, "inf", "nan"]}
    assert table["audit"][0]["written"] == "INT8"
    assert table["perplexity"] is None
    assert set(table["versions"]) >= {"torch", "onnx", "onnxruntime", "fptq-compiler"}


def test_an_audit_row_says_whether_it_is_as_requested() -> None:
    assert not filled_report().audit[0].as_requested
    assert AuditRow("head", "INT8", "INT8", 1, 1).as_requested


def test_a_report_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("old", encoding="utf-8")
    filled_report().write(path)
    assert json.loads(path.read_text(encoding="utf-8"))["seed"] == 3
    assert list(tmp_path.iterdir()) == [path]


def test_a_report_that_cannot_be_written_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match="cannot write it: No such file"):
        filled_report().write(tmp_path / "none" / "report.json")
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(LoweringError, match="cannot write it"):
        filled_report().write(folder)
    assert list(tmp_path.iterdir()) == [folder]


def test_a_stage_is_timed_also_when_it_fails() -> None:
    report = Report("toy")

    def fail() -> None:
        with report.stage("broken"):
            time.sleep(0.01)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    (row,) = report.stages
    assert row.name == "broken"
    assert row.seconds >= 0.01
    assert row.peak_rss_mb > 1.0


@pytest.mark.skipif(resident_bytes().total == 0, reason="this system has no /proc/self/statm")
def test_a_stage_sees_memory_that_it_gave_back() -> None:
    report = Report("toy")
    size = 100_000_000  # far above what the test runner itself moves by
    with report.stage("before"):
        pass
    with report.stage("large"):
        block = b"x" * size  # every page is touched
        time.sleep(0.1)  # five sampling intervals
        del block
    with report.stage("after"):
        pass
    before, large, after = (row.peak_rss_mb for row in report.stages)
    assert large - before > 0.8 * size / 1e6  # the rest for pages freed meanwhile
    assert large - after > 0.8 * size / 1e6
    first, most, _ = (row.peak_anonymous_mb for row in report.stages)
    assert most - first > 0.8 * size / 1e6


@pytest.mark.skipif(resident_bytes().total == 0, reason="this system has no /proc/self/statm")
def test_pages_of_a_file_are_not_anonymous(tmp_path: Path) -> None:
    size = 100_000_000
    path = tmp_path / "pages"
    path.write_bytes(bytes(size))
    report = Report("toy")
    with report.stage("before"):
        pass
    with report.stage("mapped"), path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        assert not any(mapped[place] for place in range(0, size, 4096))
    mapped.close()
    before, after = report.stages
    assert after.peak_rss_mb - before.peak_rss_mb > 0.8 * size / 1e6
    assert after.peak_anonymous_mb - before.peak_anonymous_mb < 0.2 * size / 1e6


def test_stages_nest() -> None:
    report = Report("toy")
    with report.stage("outer"), report.stage("inner"):
        pass
    assert [row.name for row in report.stages] == ["inner", "outer"]


class Recorder(SilentProgress):
    def __init__(self) -> None:
        self.heard: list[str] = []

    def start(self, label: str, total: int | None = None) -> None:
        self.heard.append(f"start {label} {total}")

    def advance(self, n: int = 1, note: str = "") -> None:
        self.heard.append(f"advance {n}")

    def done(self) -> None:
        self.heard.append("done")


def test_track_ends_the_work_also_when_interrupted() -> None:
    recorder = Recorder()
    assert list(track([1, 2], recorder, "count", 2)) == [1, 2]
    assert recorder.heard == ["start count 2", "advance 1", "advance 1", "done"]
    recorder = Recorder()
    work = track([1, 2], recorder, "count")
    next(work)
    work.close()  # type: ignore[attr-defined]
    assert recorder.heard == ["start count None", "done"]
