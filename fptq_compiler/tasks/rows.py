"""Read the questions of a task from a file of JSON lines, plain or compressed by gzip.

A task has rows of one form:

    {"query": text, "choices": [text, …], "gold": index}
        each choice, after a space, continues the query
    {"sentence": text with one "_", "choices": [text, …], "gold": index}
        what stands after the "_" continues the text before it with a choice in its place
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final, Literal

from fptq_compiler.closed_config import nearest
from fptq_compiler.errors import CaptureError, RecipeError


@dataclass(frozen=True)
class TaskFile:
    """A task's file, without its suffix, and what its rows ask: a query or a sentence."""

    stem: str
    asks: Literal["query", "sentence"]

    @property
    def expected(self) -> str:
        """A row in words."""
        text = "text" if self.asks == "query" else 'text with one "_"'
        return f'{{"{self.asks}": {text}, "choices": [text, …], "gold": index of a choice}}'


TASKS: Final[Mapping[str, TaskFile]] = {
    "piqa": TaskFile("piqa_valid", "query"),
    "arc_easy": TaskFile("arc_easy_test", "query"),
    "winogrande": TaskFile("winogrande_dev", "sentence"),
    "hellaswag": TaskFile("hellaswag_val", "query"),
}

_SUFFIXES: Final = (".jsonl", ".jsonl.gz")
_BLANK: Final = "_"


@dataclass(frozen=True)
class Choice:
    """One answer: how likely is `continuation` after `context`?"""

    context: str
    continuation: str


@dataclass(frozen=True)
class Question:
    """One row of a task.

    Attributes:
        where: file and line, for messages.
        choices: at least two.
        gold: index of the right one.
        lengths: characters of each choice, by which acc_norm divides; None where all choices
            have the same continuation, and dividing would mean nothing.
    """

    where: str
    choices: tuple[Choice, ...]
    gold: int
    lengths: tuple[int, ...] | None


@dataclass(frozen=True)
class Task:
    """A task's name and questions."""

    name: str
    questions: tuple[Question, ...]


def check_tasks(names: Collection[str]) -> None:
    """Refuses tasks that do not exist.

    Raises:
        RecipeError: naming the nearest one.
    """
    for name in names:
        if name not in TASKS:
            message = f"unknown task {name!r}: {nearest(name, TASKS)}"
            raise RecipeError(message)


def read_task(name: str, folder: Path, limit: int | None = None) -> Task:
    """Reads the questions of a task.

    Args:
        name: one of TASKS.
        folder: where its file lies.
        limit: how many of the first rows to take; None is all of them.

    Raises:
        CaptureError: no such file, or naming the line that is not as expected.
    """
    file = TASKS[name]
    paths = [folder / (file.stem + suffix) for suffix in _SUFFIXES]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        listed = " or ".join(path.name for path in paths)
        message = f"{name}: {folder} holds no {listed}. Name the tasks' folder."
        raise CaptureError(message)
    questions = tuple(
        _question(line, file, f"{path.name}, line {number}")
        for number, line in islice(_lines(path), limit)
    )
    if not questions:
        message = f"{path.name}: the file is empty, expected one JSON object per line."
        raise CaptureError(message)
    return Task(name, questions)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number, from 1, and text of each line that is not empty."""
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        message = f"{path.name}: expected UTF-8 text, or gzip of it in a .gz ({error})."
        raise CaptureError(message) from None


def _question(line: str, file: TaskFile, where: str) -> Question:
    try:
        row = json.loads(line)
    except ValueError as error:
        message = f"{where}: not JSON ({error}), expected {file.expected}"
        raise CaptureError(message) from None
    wrong = _what_is_wrong(row, file.asks)
    if wrong is not None:
        message = f"{where}: {wrong}, expected {file.expected}"
        raise CaptureError(message)
    text, choices, gold = row[file.asks], row["choices"], row["gold"]
    if file.asks == "query":
        answers = tuple(Choice(text, f" {choice}") for choice in choices)
        return Question(where, answers, gold, tuple(len(choice) for choice in choices))
    before, after = text.split(_BLANK)
    return Question(where, tuple(Choice(before + choice, after) for choice in choices), gold, None)


def _what_is_wrong(row: Any, asks: str) -> str | None:
    """Says what is not as expected of a row, if anything."""
    if not isinstance(row, dict):
        return f"found {type(row).__name__}"
    missing = [key for key in (asks, "choices", "gold") if key not in row]
    if missing:
        return f"{' and '.join(missing)} missing"
    text, choices, gold = row[asks], row["choices"], row["gold"]
    if not _is_text(text):
        return f"{asks} is {text!r}"
    if asks == "sentence" and (text.count(_BLANK) != 1 or not text.split(_BLANK)[1].strip()):
        return f'sentence is {text!r}, without one "_" that text follows'
    if not isinstance(choices, list) or len(choices) < 2 or not all(map(_is_text, choices)):
        return f"choices is {choices!r}, not a list of two or more texts"
    if type(gold) is not int or not 0 <= gold < len(choices):
        return f"gold is {gold!r} of {len(choices)} choices"
    return None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
