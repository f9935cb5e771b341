"""Seconds and peak memory of one stage of the compilation."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from fptq_compiler.memory import return_freed_memory

if TYPE_CHECKING:
    from fptq_compiler.report import StageRow

MEGABYTE: Final = 1e6
_STATM: Final = Path("/proc/self/statm")
_INTERVAL: Final = 0.02
"""Seconds between two samples: a hundredth of the shortest stage worth a look."""


def high_water_mark() -> int:
    """Gives the most resident bytes that the process ever had, or 0 where nobody knows."""
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Resident(NamedTuple):
    """Resident bytes: all of them, and those that no file holds, which nobody can take away."""

    total: int
    anonymous: int


def resident_bytes() -> Resident:
    """Gives the resident bytes of the process now, or zeros where /proc does not say."""
    try:
        _, resident, shared, *_ = _STATM.read_text(encoding="ascii").split()
        page = os.sysconf("SC_PAGE_SIZE")
        return Resident(int(resident) * page, (int(resident) - int(shared)) * page)
    except (OSError, ValueError):
        return Resident(0, 0)


class StageClock:
    """Context manager: measures a stage and appends its row, whether or not it succeeds.

    The system keeps one high-water mark for the whole process. Where a stage raises it, the
    new mark is that stage's exact peak. Otherwise the peak lies below the mark, and a thread
    that samples /proc/self/statm finds it; where there is no such file, the mark is given,
    which is then an upper bound. The peak of anonymous memory is always sampled. Stages may
    nest. What the stage freed goes back to the system.
    """

    def __init__(self, name: str, rows: list[StageRow]) -> None:
        self._name = name
        self._rows = rows
        self._sampled = Resident(0, 0)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._mark = high_water_mark()
        self._sampled = resident_bytes()
        if self._sampled.total:
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        self._start = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        from fptq_compiler.report import StageRow

        seconds = time.perf_counter() - self._start
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
        mark = high_water_mark()
        self._look()
        sampled, anonymous = self._sampled
        peak = mark if mark > self._mark or not sampled else sampled
        self._rows.append(
            StageRow(self._name, seconds, peak / MEGABYTE, anonymous / MEGABYTE)
        )
        return_freed_memory()

    def _sample(self) -> None:
        while not self._stop.wait(_INTERVAL):
            self._look()

    def _look(self) -> None:
        self._sampled = Resident(*map(max, self._sampled, resident_bytes()))
