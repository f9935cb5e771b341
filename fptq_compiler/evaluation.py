"""The record of an evaluation: perplexity, closeness to the original, accuracy in tasks."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fptq_compiler.closeness import Closeness
from fptq_compiler.perplexity import PerplexityResult
from fptq_compiler.tasks.evaluate import TaskResult


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one model.

    Attributes:
        model: its file's name.
        text: the text's name; None without one, and then there is no perplexity.
        perplexity: on the text.
        original: the name of the model to compare with; None without one.
        closeness: to the original, on the same windows.
        limit: rows taken of each task; None where all of them were.
        tasks: a result of each.
    """

    model: str
    text: str | None
    perplexity: PerplexityResult | None
    original: str | None
    closeness: Closeness | None
    limit: int | None
    tasks: tuple[TaskResult, ...]

    def to_dict(self) -> dict[str, Any]:
        """Gives the measures by name, without those that were not asked for."""
        found: dict[str, Any] = {"model": self.model}
        if self.perplexity is not None:
            found |= {"text": self.text, **self.perplexity.to_dict()}
        if self.closeness is not None:
            found |= {"original": self.original, **asdict(self.closeness)}
        if self.tasks:
            found |= {"limit": self.limit, "tasks": [task.to_dict() for task in self.tasks]}
        return found
