"""Log-likelihood of tokens, for any function from token ids to logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from fptq_compiler.errors import CaptureError, VerificationError

LogitsFunction = Callable[[Tensor], Tensor]
"""From token ids [B, T] int64 to logits [B, T, V]; position t predicts token t + 1."""

_POSITIONS_AT_ONCE: Final = 256
"""Rows of logits in float32 at once: bounds memory where the vocabulary is large."""


def run_model(logits_function: LogitsFunction, ids: Tensor, where: str) -> Tensor:
    """Runs the model; an embedding raises IndexError where an id is too large.

    Args:
        logits_function: the model.
        ids: [B, T] int64.
        where: the place in the text or task, for messages.

    Returns:
        The logits [B, T, V].

    Raises:
        CaptureError: the model refuses the ids.
        VerificationError: logits of another shape.
    """
    try:
        with torch.no_grad():
            logits = logits_function(ids)
    except IndexError as error:
        message = (
            f"{where}: the model refused token ids from {int(ids.min())} to {int(ids.max())} "
            f"({error}): is this the model's own tokenizer?"
        )
        raise CaptureError(message) from error
    if logits.ndim != 3 or logits.shape[:2] != ids.shape:
        batch, tokens = ids.shape
        message = (
            f"{where}: the logits have shape {tuple(logits.shape)}, expected "
            f"({batch}, {tokens}, vocabulary)"
        )
        raise VerificationError(message)
    return logits


def log_likelihood(logits: Tensor, targets: Tensor, where: str) -> float:
    """Sums log p(target) in float64 over log-probabilities in float32.

    Args:
        logits: [P, V].
        targets: [P].
        where: the place in the text or task, for messages.

    Raises:
        CaptureError: a target is outside the vocabulary.
        VerificationError: a sum is not a number.
    """
    vocabulary = logits.shape[1]
    if int(targets.max()) >= vocabulary or int(targets.min()) < 0:
        message = (
            f"{where}: token id {int(targets.max())} is outside the model's vocabulary of "
            f"{vocabulary}: is this the model's own tokenizer?"
        )
        raise CaptureError(message)
    total = torch.zeros((), dtype=torch.float64)
    for first in range(0, targets.numel(), _POSITIONS_AT_ONCE):
        part = slice(first, first + _POSITIONS_AT_ONCE)
        log_p = torch.log_softmax(logits[part].float(), dim=-1)
        chosen = log_p.gather(1, targets[part, None].to(log_p.device))
        total += chosen.double().sum().cpu()
    if math.isnan(float(total)):
        message = f"{where}: the logits hold values that are not numbers (NaN)"
        raise VerificationError(message)
    return float(total)
