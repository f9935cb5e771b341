"""How far a student's next-token distribution is from its teacher's, in nats a token.

With P the teacher's softmax, Q the student's, M = (P + Q) / 2, and sums over the vocabulary:

    forward KL        KL(P‖Q) = Σ P (log P - log Q)
    Jensen-Shannon    (KL(P‖M) + KL(Q‖M)) / 2, symmetric and at most ln 2
    top-1 agreement   the share of tokens where P and Q have their maximum at the same id

Each is computed with its gradient to the student's logits: Q - P, and Q times (log Q - log M) / 2
less its mean under Q. Logits may be whole, or given by what the last linear reads.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from fptq_compiler.optimize.token_parts import Given, mean_over_tokens


def forward_kl(student: Given, teacher: Given) -> Tensor:
    """KL(teacher‖student), the mean over tokens in nats.

    Args:
        student: logits [..., V], finite, of any float type; gradients flow to them.
        teacher: logits [..., V], on the same device.

    Returns:
        float32 [].

    Raises:
        ValueError: the shapes differ, or there are no tokens.
    """
    return mean_over_tokens(_forward_kl, student, teacher)


def top_k_kl(student: Given, teacher: Given, *, k: int) -> Tensor:
    """The forward KL among the teacher's k likeliest ids (arXiv 2501.13987), in nats.

    Args:
        student: logits [..., V], finite, of any float type; gradients flow to them.
        teacher: logits [..., V], on the same device.
        k: ids of each token that count; all of them where V is less.

    Returns:
        float32 [].

    Raises:
        ValueError: the shapes differ, or there are no tokens.
    """
    return mean_over_tokens(partial(_top_k_kl, k=k), student, teacher)


def likeliest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of [..., V], or all, and their ids; both [..., k]."""
    values, ids = logits.topk(min(k, logits.shape[-1]), dim=-1)
    return values, ids


def kl_among(student: Given, teacher_logits: Tensor, ids: Tensor) -> Tensor:
    """The forward KL among some ids of each token (arXiv 2501.13987), in nats.

    Args:
        student: logits [..., V], finite, of any float type; gradients flow to them.
        teacher_logits: [..., k], of those ids.
        ids: [..., k] of int64.

    Returns:
        float32 [].

    Raises:
        ValueError: there are no tokens, or the shapes differ.
    """
    return mean_over_tokens(_kl_among, student, teacher_logits, ids)


def jensen_shannon(student: Given, teacher: Given) -> Tensor:
    """The Jensen-Shannon divergence, the mean over tokens in nats; between 0 and ln 2.

    Args:
        student: logits [..., V], finite, of any float type; gradients flow to them.
        teacher: logits [..., V], on the same device.

    Returns:
        float32 [].

    Raises:
        ValueError: the shapes differ, or there are no tokens.
    """
    return mean_over_tokens(_jensen_shannon, student, teacher)


@torch.no_grad()
def top1_agreement(student: Given, teacher: Given) -> Tensor:
    """The share of tokens whose likeliest id is the same: [..., V] twice to float32 [].

    Raises:
        ValueError: the shapes differ, or there are no tokens.
    """
    return mean_over_tokens(_agreeing, student, teacher)


def _log_softmax(logits: Tensor) -> Tensor:
    return functional.log_softmax(logits, dim=-1, dtype=torch.float32)


def _check(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        message = (
            f"the student has a vocabulary of {student.shape[-1]}, the teacher one of "
            f"{teacher.shape[-1]}; expected the same"
        )
        raise ValueError(message)


def _forward_kl(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [N, V] twice to the sum over tokens [], and its gradient [N, V]."""
    _check(student, teacher)
    log_q, log_p = _log_softmax(student), _log_softmax(teacher)
    total = functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
    return total, log_q.exp_().sub_(log_p.exp_())


def _top_k_kl(student: Tensor, teacher: Tensor, *, k: int) -> tuple[Tensor, Tensor]:
    """The same among the teacher's k likeliest."""
    _check(student, teacher)
    return _kl_among(student, *likeliest(teacher, k))


def _kl_among(student: Tensor, teacher: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The same of logits [N, V], and [N, k] of the ids [N, k]."""
    total, gradient = _forward_kl(student.gather(-1, ids), teacher)
    return total, torch.zeros_like(student, dtype=torch.float32).scatter_(-1, ids, gradient)


def _jensen_shannon(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [N, V] twice to the sum over tokens [], and its gradient [N, V].

    log(P / M) = ln 2 - softplus(log Q - log P): of the difference alone, so that what is close
    keeps its digits.
    """
    _check(student, teacher)
    log_q, log_p = _log_softmax(student), _log_softmax(teacher)
    difference = log_q - log_p
    over_p = math.log(2) - functional.softplus(difference)
    over_q = math.log(2) - functional.softplus(difference.neg_())
    q, p = log_q.exp_(), log_p.exp_()
    from_q = over_q.mul_(q)
    each = from_q.sum(-1, keepdim=True)
    total = (each.sum() + p.mul_(over_p).sum()) / 2
    return total, from_q.addcmul_(q, each, value=-1).mul_(0.5)


def _agreeing(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """How many tokens agree; nothing learns from it."""
    _check(student, teacher)
    same = student.argmax(dim=-1) == teacher.argmax(dim=-1)
    return same.sum(dtype=torch.float32), torch.zeros_like(student)
