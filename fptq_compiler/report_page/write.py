"""The files of a report: a page for readers, data for tools."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from fptq_compiler.report import Report, check_new_file, write_text_whole
from fptq_compiler.report_page.page import page


def _write_page(report: Report, path: Path) -> None:
    write_text_whole(path, page(report))


FORMS: Final[Mapping[str, Callable[[Report, Path], None]]] = {
    ".html": _write_page,
    ".json": Report.write,
}


def check_reports(paths: Sequence[Path]) -> None:
    """Refuse a file name that says neither of the two forms, before anything is compiled.

    Raises:
        RecipeError: another ending, or a folder that is not there.
    """
    for path in paths:
        check_new_file("--report", path, FORMS)


def write_report(report: Report, path: Path) -> None:
    """Write the report in the form that the name's ending says, whole or not at all.

    Raises:
        LoweringError: the file cannot be written.
    """
    FORMS[path.suffix.lower()](report, path)
