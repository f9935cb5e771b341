"""How long work tells of its progress, without knowing who listens: the library never prints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

_Item = TypeVar("_Item")


class Progress(Protocol):
    """Listens to work that takes long.

    A `start` while another piece of work is under way nests in it; `done` ends the innermost.
    """

    def start(self, label: str, total: int | None = None) -> None:
        """Begins a piece of work of `total` steps; None where nobody knows how many."""

    def advance(self, n: int = 1, note: str = "") -> None:
        """Says that `n` more steps are done; `note` is a word on the state, such as a loss."""

    def done(self) -> None:
        """Ends the innermost piece of work."""


class SilentProgress:
    """Listens and says nothing."""

    def start(self, label: str, total: int | None = None) -> None:
        """Begins a piece of work."""

    def advance(self, n: int = 1, note: str = "") -> None:
        """Counts nothing."""

    def done(self) -> None:
        """Ends the innermost piece of work."""


def track(
    items: Iterable[_Item], progress: Progress, label: str, total: int | None = None
) -> Iterator[_Item]:
    """Yields `items`, one step each, and ends the piece of work also when interrupted."""
    progress.start(label, total)
    try:
        for item in items:
            yield item
            progress.advance()
    finally:
        progress.done()
