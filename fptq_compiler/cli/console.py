"""What the commands show while they work: progress and the log, both on stderr."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import click
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

from fptq_compiler.progress import Progress, SilentProgress

_PATIENCE: Final = 15.0
"""Seconds between two lines about the same piece of work, where there is no terminal."""

_NOTICES: Final = ("torch.onnx", "torch.export")
"""Loggers that tell developers of missing extras; they have handlers of their own."""


class BarProgress:
    """Progress bars on a terminal, the innermost lowest; each vanishes when its work is done."""

    def __init__(self, console: Console) -> None:
        self._bars = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", style="dim"),
            console=console,
            transient=True,
        )
        self._open: list[TaskID] = []

    def start(self, label: str, total: int | None = None) -> None:
        """Begins a piece of work, inside the one under way."""
        if not self._open:
            self._bars.start()
        self._open.append(
            self._bars.add_task("  " * len(self._open) + label, total=total, note="")
        )

    def advance(self, n: int = 1, note: str = "") -> None:
        """Moves the innermost bar on."""
        if self._open:
            self._bars.update(self._open[-1], advance=n, note=note)

    def done(self) -> None:
        """Takes the innermost bar away."""
        if self._open:
            self._bars.remove_task(self._open.pop())
        if not self._open:
            self._bars.stop()

    def close(self) -> None:
        """Gives the terminal back, also in the middle of the work."""
        while self._open:
            self.done()


class _Work:
    """One piece of work under way: its label, steps and times."""

    def __init__(self, label: str, total: int | None, now: float) -> None:
        self.label = label
        self.total = total
        self.steps = 0
        self.began = now
        self.spoke = now


class LineProgress:
    """Plain lines where stderr is no terminal: at the start, now and then, and at the end."""

    def __init__(
        self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._say = say
        self._clock = clock
        self._open: list[_Work] = []

    def start(self, label: str, total: int | None = None) -> None:
        """Says what begins; work inside other work only speaks up when it takes long."""
        if not self._open:
            self._say(f"{label} ...")
        self._open.append(_Work(label, total, self._clock()))

    def advance(self, n: int = 1, note: str = "") -> None:
        """Counts, and says how far it is when nothing was said for a while."""
        if not self._open:
            return
        work = self._open[-1]
        work.steps += n
        now = self._clock()
        if now - work.spoke >= _PATIENCE:
            for outer in self._open:
                outer.spoke = now
            of = f" of {work.total}" if work.total is not None else ""
            self._say(f"{work.label}: {work.steps}{of} {note}".rstrip())

    def done(self) -> None:
        """Says how long the outermost piece of work took."""
        if self._open:
            work = self._open.pop()
            if not self._open:
                self._say(f"{work.label}: done in {self._clock() - work.began:.1f} s")


@contextmanager
def listening(verbosity: int) -> Iterator[Progress]:
    """Sets the log and warnings up for a command and gives its progress.

    Args:
        verbosity: -1 shows neither log nor progress, 0 warnings and progress, 1 the whole log.
    """
    console = Console(stderr=True)
    level = {-1: logging.ERROR, 0: logging.WARNING}.get(verbosity, logging.DEBUG)
    handler = RichHandler(
        console=console, show_path=verbosity > 0, show_time=False, markup=False, highlighter=None
    )
    logger = logging.getLogger("fptq_compiler")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    others = {name: logging.getLogger(name).level for name in _NOTICES}
    if verbosity <= 0:
        for name in others:
            logging.getLogger(name).setLevel(logging.ERROR)
    bars = BarProgress(console) if console.is_terminal and verbosity >= 0 else None
    try:
        with warnings.catch_warnings():
            if verbosity <= 0:
                warnings.simplefilter("ignore")  # other libraries' notices to their developers
            if bars is not None:
                yield bars
            elif verbosity >= 0:
                yield LineProgress(lambda text: click.echo(text, err=True))
            else:
                yield SilentProgress()
    finally:
        if bars is not None:
            bars.close()
        logger.removeHandler(handler)
        logger.setLevel(before)
        for name, other in others.items():
            logging.getLogger(name).setLevel(other)
