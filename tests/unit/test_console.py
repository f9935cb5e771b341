from __future__ import annotations

import logging

import pytest

from fptq_compiler.cli.collapse import collapse, number_ranges, without_numbers
from fptq_compiler.cli.console import BarProgress, LineProgress, listening
from fptq_compiler.cli.entry import Settings
from fptq_compiler.cli.tables import print_sites, sites_table, stdout_console
from fptq_compiler.report import Report, SiteRow


def test_number_ranges() -> None:
    assert number_ranges([5, 0, 1, 2, 7, 8, 2]) == "0-2,5,7-8"


def test_nodes_differ_by_their_number_only() -> None:
    assert without_numbers("add_7 reads int8 of mul_19, 2 more") == "add reads int8 of mul, 2 more"


def test_only_sites_alike_are_drawn_together() -> None:
    rows = [
        SiteRow("residual", "residual", "width 8"),
        SiteRow("blocks.0.attention", "attention", "heads 2"),
        SiteRow("blocks.0.mlp", "mlp", "width 4"),
        SiteRow("blocks.1.attention", "attention", "heads 2"),
        SiteRow("blocks.1.mlp", "mlp", "width 8"),
        SiteRow("blocks.2", "mlp", "width 8"),
    ]
    assert [group.name for group in collapse(rows, lambda row: row.shape)] == [
        "residual",
        "blocks 0-1 attention",
        "blocks 0 mlp",
        "blocks 1 mlp",
        "blocks 2",
    ]


def test_every_site_has_its_line_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("toy", sites=[SiteRow(f"blocks.{n}", "mlp", "[8, 16]") for n in (0, 1, 2)])
    print_sites(stdout_console(), report, every=True)
    shown = capsys.readouterr().out
    assert "blocks.2" in shown
    assert "[8, 16]" in shown
    assert "Near misses" not in shown
    assert sites_table(report.sites).row_count == 1


def test_lines_of_progress_are_few() -> None:
    said: list[str] = []
    now = 0.0
    progress = LineProgress(said.append, lambda: now)
    progress.start("compile", None)
    progress.start("local", 100)
    for step in range(100):
        now = step * 0.5
        progress.advance(1, f"loss {step}")
    progress.done()
    progress.done()
    progress.done()
    assert said == [
        "compile ...",
        "local: 31 of 100 loss 30",
        "local: 61 of 100 loss 60",
        "local: 91 of 100 loss 90",
        "compile: done in 49.5 s",
    ]


def test_bars_nest_and_close() -> None:
    bars = BarProgress(stdout_console())
    bars.start("outer", 2)
    bars.start("inner")
    bars.advance(1, "x")
    bars.close()
    bars.advance()
    bars.done()


def test_the_log_is_shown_by_verbosity(capsys: pytest.CaptureFixture[str]) -> None:
    for verbosity, shown in ((-1, False), (0, False), (1, True)):
        with listening(verbosity):
            logging.getLogger("fptq_compiler.anything").info("a detail")
        assert ("a detail" in capsys.readouterr().err) is shown


def test_settings_refuse_both_ways() -> None:
    settings = Settings()
    settings.set(verbose=False, quiet=True)
    assert settings.verbosity == -1
