"""Accuracy of a task from the log-likelihoods of its choices."""

from __future__ import annotations

import math
from collections.abc import Sequence


def likeliest(scores: Sequence[float]) -> int:
    """Gives the index of the largest score, the first of equals."""
    return max(range(len(scores)), key=scores.__getitem__)


def normalised(scores: Sequence[float], lengths: Sequence[int]) -> list[float]:
    """Divides each log-likelihood by the characters of its choice."""
    return [score / length for score, length in zip(scores, lengths, strict=True)]


def share(right: Sequence[bool]) -> tuple[float, float | None]:
    """Gives the share p of right answers, and its standard error √(p (1 - p) / (n - 1)).

    The standard error of a single answer is None.
    """
    n = len(right)
    p = sum(right) / n
    return p, math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else None
