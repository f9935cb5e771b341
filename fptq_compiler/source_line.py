"""Where in the model's own code a node was written, read from an exported stack trace."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePath, PureWindowsPath
from typing import Final

FRAME: Final = re.compile(r'File "(?P<file>[^"]*)", line (?P<line>\d+), in (?P<function>.+)')
TORCH: Final = re.compile(
    r"<eval_with_key>|[\\/]torch[\\/](nn|fx|export|autograd|utils|_\w+|functional\.py)\b"
)


@dataclass(frozen=True)
class SourceLine:
    """A line of a model's code: its file as it was exported, its number, and its function."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        path = PureWindowsPath(self.file) if "\\" in self.file else PurePath(self.file)
        return f"{path.name}:{self.line} in {self.function}"

    @classmethod
    def read(cls, text: str) -> SourceLine | None:
        """Read `File "…", line N, in F`; None where the text has no such part."""
        found = FRAME.search(text)
        return cls(found["file"], int(found["line"]), found["function"]) if found else None


def model_frame(trace: str) -> str:
    """The innermost frame of a stack trace that is not torch's own; empty where there is none.

    What torch's modules and functions do inside says nothing to a reader: it is the same in
    every model. A trace of torch's frames alone gives its innermost.
    """
    frames = [found[0] for found in FRAME.finditer(trace)]
    own = [frame for frame in frames if not TORCH.search(frame)]
    return next(reversed(own or frames), "")
