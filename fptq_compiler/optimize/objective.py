"""What the end-to-end stage minimises: the distance of a student from its teacher."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fptq_compiler.optimize.divergence import (
    forward_kl,
    jensen_shannon,
    kl_among,
    likeliest,
    top_k_kl,
)
from fptq_compiler.optimize.student import Student
from fptq_compiler.optimize.token_parts import Logits

Divergence = Callable[[Logits, Logits], Tensor]
Objective = Callable[[Student, Student, Tensor], Tensor]


def objective(name: str, top_k: int, *, remember_teacher: bool = False) -> Objective:
    """By name from student, teacher and ids (B, S) the loss [], the mean over tokens.

    Args:
        name: "jensen-shannon", "forward-kl", "top-k-kl", or "hidden-mse", whose teacher has the
            student's transforms.
        top_k: of "top-k-kl", the teacher's likeliest tokens that count.
        remember_teacher: of "top-k-kl", ask the teacher about each sequence once.
    """
    if name == "hidden-mse":
        return _hidden_mse
    if remember_teacher:
        return RememberedTeacher(top_k)
    divergences: dict[str, Divergence] = {
        "jensen-shannon": jensen_shannon,
        "forward-kl": forward_kl,
        "top-k-kl": partial(top_k_kl, k=top_k),
    }
    return partial(_of_logits, divergences[name])


def _of_logits(
    divergence: Divergence, student: Student, teacher: Student, ids: Tensor
) -> Tensor:
    with torch.no_grad():
        expected = teacher.logits(ids)
    return divergence(student.logits(ids), expected)


class RememberedTeacher:
    """The top-k KL to a teacher that is asked about each sequence once.

    Its k largest logits and their ids are kept, 8 k bytes a token. It runs one sequence at a time,
    so that what it says does not depend on which others were new.
    """

    def __init__(self, k: int) -> None:
        self._k = k
        self._known: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def __call__(self, student: Student, teacher: Student, ids: Tensor) -> Tensor:
        """The loss [] of ids (B, S)."""
        said = [self._said(teacher, row) for row in ids]
        values, likely = (torch.stack(parts).to(ids.device) for parts in zip(*said, strict=True))
        return kl_among(student.logits(ids), values, likely.long())

    @torch.no_grad()
    def _said(self, teacher: Student, row: Tensor) -> tuple[Tensor, Tensor]:
        """Of a sequence (S,) the largest logits, and their ids, (S, k)."""
        key = tuple(row.tolist())
        if key not in self._known:
            values, ids = likeliest(teacher(row.unsqueeze(0))[0], self._k)
            self._known[key] = values.cpu(), ids.int().cpu()
        return self._known[key]


def _hidden_mse(student: Student, teacher: Student, ids: Tensor) -> Tensor:
    """Of what the head reads, in units of its mean square."""
    with torch.no_grad():
        expected = teacher.hidden(ids)
    return (student.hidden(ids) - expected).square().mean() / expected.square().mean()
