"""How far a student's next-token distribution is from its teacher's, in nats a token.

With P the teacher's softmax, Q the student's, M = (P + Q) / 2, and sums over the vocabulary:

    forward KL        KL(P‖Q) = Σ P (log P - log Q)
    Jensen-Shannon    (KL(P‖M) + KL(Q‖M)) / 2, symmetric and at most ln 2
    top-1 agreement   the share of tokens where P and Q have their maximum at the same id

The softmaxes exist in float32 for TOKENS_AT_ONCE tokens only, and again when their part of the
gradient is computed: beside the logits themselves the memory does not grow with the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

TOKENS_AT_ONCE = 32


def forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher‖student), the mean over tokens in nats.

    Args:
        student_logits: [..., V], finite, of any float type; gradients flow to them.
        teacher_logits: [..., V], on the same device.

    Returns:
        float32 [].

    Raises:
        ValueError: the shapes differ, or there are no tokens.
    """
    return _mean_over_tokens(_forward_kl, student_logits, teacher_logits)


def top_k_kl(student_logits: Tensor, teacher_logits: Tensor, *, k: int) -> Tensor:
    """The forward KL among the teacher's k likeliest ids (arXiv 2501.13987), in nats.

    Args:
        student_logits: [..., V], finite, of any float type; gradients flow to them.
        teacher_logits: [..., V], on the same device.
        k: ids of each token that count; all of them where V is less.

    Returns:
        float32 [].

    Raises:
        ValueError: the shapes differ, or there are no tokens.
    """
    _check(student_logits, teacher_logits)
    return kl_among(student_logits, *likeliest(teacher_logits, k))


def likeliest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of [..., V], or all, and their ids; both [..., k]."""
    values, ids = logits.topk(min(k, logits.shape[-1]), dim=-1)
    return values, ids


def kl_among(student_logits: Tensor, teacher_logits: Tensor, ids: Tensor) -> Tensor:
    """The forward KL among some ids of each token (arXiv 2501.13987), in nats.

    Args:
        student_logits: [..., V], finite, of any float type; gradients flow to them.
        teacher_logits: [..., k], of those ids.
        ids: [..., k] of int64.

    Returns:
        float32 [].

    Raises:
        ValueError: there are no tokens, or the shapes differ.
    """
    return forward_kl(student_logits.gather(-1, ids), teacher_logits)


def jensen_shannon(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """The Jensen-Shannon divergence, the mean over tokens in nats; between 0 and ln 2.

    Args:
        student_logits: [..., V], finite, of any float type; gradients flow to them.
        teacher_logits: [..., V], on the same device.

    Returns:
        float32 [].

    Raises:
        ValueError: the shapes differ, or there are no tokens.
    """
    return _mean_over_tokens(_jensen_shannon, student_logits, teacher_logits)


@torch.no_grad()
def top1_agreement(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """The share of tokens whose likeliest id is the same: [..., V] twice to float32 [].

    Raises:
        ValueError: the shapes differ, or there are no tokens.
    """
    return _mean_over_tokens(_agreeing, student_logits, teacher_logits)


def _mean_over_tokens(
    summed: Callable[[Tensor, Tensor], Tensor], student_logits: Tensor, teacher_logits: Tensor
) -> Tensor:
    _check(student_logits, teacher_logits)
    student, teacher = (x.reshape(-1, x.shape[-1]) for x in (student_logits, teacher_logits))
    parts = (torch.split(x, TOKENS_AT_ONCE) for x in (student, teacher))
    sums = [
        checkpoint(summed, q, p, use_reentrant=False, preserve_rng_state=False)
        for q, p in zip(*parts, strict=True)
    ]
    return torch.stack(sums).sum() / student.shape[0]


def _check(student_logits: Tensor, teacher_logits: Tensor) -> None:
    if student_logits.shape != teacher_logits.shape or student_logits.numel() == 0:
        message = (
            f"the student's logits have shape {tuple(student_logits.shape)}, the teacher's "
            f"{tuple(teacher_logits.shape)}; expected the same (..., vocabulary) of some tokens"
        )
        raise ValueError(message)


def _log_softmax(logits: Tensor) -> Tensor:
    return functional.log_softmax(logits, dim=-1, dtype=torch.float32)


def _forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Σ over tokens: [N, V] twice to []."""
    log_q, log_p = _log_softmax(student_logits), _log_softmax(teacher_logits)
    return functional.kl_div(log_q, log_p, reduction="sum", log_target=True)


def _jensen_shannon(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Σ over tokens: [N, V] twice to [].

    log(P / M) = ln 2 - softplus(log Q - log P): of the difference alone, so that what is close
    keeps its digits.
    """
    log_q, log_p = _log_softmax(student_logits), _log_softmax(teacher_logits)
    difference = log_q - log_p
    over_p = math.log(2) - functional.softplus(difference)
    over_q = math.log(2) - functional.softplus(-difference)
    return (log_p.exp() * over_p + log_q.exp() * over_q).sum() / 2


def _agreeing(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """How many tokens agree: [N, V] twice to []."""
    same = student_logits.argmax(dim=-1) == teacher_logits.argmax(dim=-1)
    return same.sum(dtype=torch.float32)
