"""Log-likelihood of continuations after their contexts, many in one run of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fptq_compiler.errors import CaptureError, RuntimeInputError
from fptq_compiler.likelihood import LogitsFunction, log_likelihood, run_model
from fptq_compiler.progress import Progress, track
from fptq_compiler.text_rows import Tokenizer, encode

TOKENS_AT_ONCE: Final = 1024
"""Tokens of a batch with its padding, unless one sequence is longer: bounds the logits."""


@dataclass(frozen=True)
class TokenPair:
    """A context and what continues it.

    Attributes:
        where: file and line, for messages.
        context: int64 [C], at least one token.
        continuation: int64 [N], at least one token.
    """

    where: str
    context: Tensor
    continuation: Tensor

    @property
    def inputs(self) -> Tensor:
        """What the model reads: all but the last token, which nothing follows; [C + N - 1]."""
        return torch.cat([self.context, self.continuation])[:-1]

    def predictions(self, logits: Tensor) -> Tensor:
        """Of logits [T, V] for the inputs, those that predict the continuation: [N, V]."""
        first = self.context.numel() - 1
        return logits[first : first + self.continuation.numel()]


def encode_pair(context: str, continuation: str, tokenizer: Tokenizer, where: str) -> TokenPair:
    """Tokenises both together, as lm-evaluation-harness does, without special tokens.

    White space at the end of the context goes to the continuation, whose first token often
    begins with it. The tokens of both, less as many as the context alone has, are the
    continuation's.

    Raises:
        CaptureError: one of the two has no tokens of its own.
    """
    kept = context.rstrip()
    before = encode(kept, tokenizer)
    after = encode(context + continuation, tokenizer)[before.numel() :]
    if before.numel() == 0 or after.numel() == 0:
        which = "context" if before.numel() == 0 else "continuation"
        message = (
            f"{where}: the {which} has no tokens of its own in {kept!r} followed by "
            f"{context[len(kept) :] + continuation!r}: is this the model's own tokenizer?"
        )
        raise CaptureError(message)
    return TokenPair(where, before, after)


def score(
    logits_function: LogitsFunction, pairs: Sequence[TokenPair], progress: Progress, label: str
) -> list[float]:
    """Gives log p(continuation | context) of each pair, in nats.

    Pairs of about one length share a run, padded on the right, where a causal model does not
    look.

    Args:
        logits_function: the model.
        pairs: in any order.
        progress: a step a run.
        label: of the work.

    Raises:
        CaptureError: a token is outside the model's vocabulary.
        RuntimeInputError: a pair is longer than the model's context.
        VerificationError: logits of another shape, or not a number.
    """
    scores = [0.0] * len(pairs)
    batches = _batches([pair.inputs.numel() for pair in pairs])
    for batch in track(batches, progress, label, len(batches)):
        ids = pad_sequence([pairs[index].inputs for index in batch], batch_first=True)
        longest = pairs[batch[0]].where
        try:
            logits = run_model(logits_function, ids, longest)
        except RuntimeInputError as error:
            message = f"{longest}: {error}"
            raise RuntimeInputError(message) from error
        for index, row in zip(batch, logits, strict=True):
            pair = pairs[index]
            scores[index] = log_likelihood(pair.predictions(row), pair.continuation, pair.where)
    return scores


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of the sequences in batches, the longest sequence first in all and in each."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    batches = []
    first = 0
    while first < len(order):
        count = max(1, TOKENS_AT_ONCE // lengths[order[first]])
        batches.append(order[first : first + count])
        first += count
    return batches
