"""One task, from its questions to its accuracies."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from itertools import islice

from fptq_compiler.likelihood import LogitsFunction
from fptq_compiler.progress import Progress
from fptq_compiler.tasks.accuracy import likeliest, normalised, share
from fptq_compiler.tasks.rows import Task
from fptq_compiler.tasks.scoring import encode_pair, score
from fptq_compiler.text_rows import Tokenizer


@dataclass(frozen=True)
class TaskResult:
    """What one task gave.

    Attributes:
        task: its name.
        rows: questions asked.
        acc: share of questions whose right choice has the largest log-likelihood.
        acc_stderr: its standard error; None of a single row.
        acc_norm: the same with each log-likelihood divided by its choice's characters; None
            where all choices share one continuation.
        acc_norm_stderr: its standard error.
        tokens: that the model read, without padding.
        seconds: wall-clock time, tokenising included.
    """

    task: str
    rows: int
    acc: float
    acc_stderr: float | None
    acc_norm: float | None
    acc_norm_stderr: float | None
    tokens: int
    seconds: float

    def to_dict(self) -> dict[str, str | float | int | None]:
        """Gives the fields by name."""
        return asdict(self)


def evaluate_task(
    logits_function: LogitsFunction, tokenizer: Tokenizer, task: Task, progress: Progress
) -> TaskResult:
    """Scores every choice of every question.

    Args:
        logits_function: the model.
        tokenizer: its own.
        task: what is asked.
        progress: who listens.

    Raises:
        CaptureError: the tokenizer is not the model's.
        RuntimeInputError: a question is longer than the model's context.
        VerificationError: what the model gives are no logits.
    """
    start = time.perf_counter()
    pairs = [
        encode_pair(choice.context, choice.continuation, tokenizer, question.where)
        for question in task.questions
        for choice in question.choices
    ]
    flat = iter(score(logits_function, pairs, progress, task.name))
    scores = [list(islice(flat, len(question.choices))) for question in task.questions]
    answers = list(zip(task.questions, scores, strict=True))
    acc, acc_stderr = share([likeliest(found) == q.gold for q, found in answers])
    normed = [
        likeliest(normalised(found, q.lengths)) == q.gold
        for q, found in answers
        if q.lengths is not None
    ]
    acc_norm, acc_norm_stderr = share(normed) if normed else (None, None)
    tokens = sum(pair.inputs.numel() for pair in pairs)
    seconds = time.perf_counter() - start
    return TaskResult(
        task.name, len(answers), acc, acc_stderr, acc_norm, acc_norm_stderr, tokens, seconds
    )
