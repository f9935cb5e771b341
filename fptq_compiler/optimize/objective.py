"""What the end-to-end stage minimises: the distance of a student from its teacher."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fptq_compiler.optimize.divergence import forward_kl, jensen_shannon, top_k_kl
from fptq_compiler.optimize.student import Student

Divergence = Callable[[Tensor, Tensor], Tensor]
Objective = Callable[[Student, Student, Tensor], Tensor]


def objective(name: str, top_k: int) -> Objective:
    """By name from student, teacher and ids (B, S) the loss [], the mean over tokens.

    Args:
        name: "jensen-shannon", "forward-kl", "top-k-kl", or "hidden-mse", whose teacher has the
            student's transforms.
        top_k: of "top-k-kl", the teacher's likeliest tokens that count.
    """
    if name == "hidden-mse":
        return _hidden_mse
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
        expected = teacher(ids)
    return divergence(student(ids), expected)


def _hidden_mse(student: Student, teacher: Student, ids: Tensor) -> Tensor:
    """Of what the head reads, in units of its mean square."""
    with torch.no_grad():
        expected = teacher.hidden(ids)
    return (student.hidden(ids) - expected).square().mean() / expected.square().mean()
