"""How close a model's next-token distributions stay to the original's, on windows of a text."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fptq_compiler.errors import VerificationError
from fptq_compiler.likelihood import LogitsFunction, run_model
from fptq_compiler.optimize.divergence import forward_kl, jensen_shannon, top1_agreement


@dataclass(frozen=True)
class Closeness:
    """Means over all predicted tokens.

    Attributes:
        kl: KL(original‖model), nats a token.
        jensen_shannon: Jensen-Shannon divergence, nats a token, at most ln 2.
        top1_agreement: share of tokens where both find the same token likeliest.
    """

    kl: float
    jensen_shannon: float
    top1_agreement: float


class Comparison:
    """Runs the original beside a model, window by window; `compare` of `perplexity`."""

    def __init__(self, original: LogitsFunction) -> None:
        self._original = original
        self._sums = [0.0, 0.0, 0.0]
        self._tokens = 0

    def __call__(self, ids: Tensor, logits: Tensor) -> None:
        """Adds one window.

        Args:
            ids: [1, P + 1].
            logits: [P, V] of the model, at the first P positions.

        Raises:
            VerificationError: the original has another vocabulary.
        """
        original = run_model(self._original, ids, "the original")[0, : logits.shape[0]]
        if original.shape != logits.shape:
            message = (
                f"the original has a vocabulary of {original.shape[1]}, the model one of "
                f"{logits.shape[1]}: was it made from this original?"
            )
            raise VerificationError(message)
        for index, measure in enumerate((forward_kl, jensen_shannon, top1_agreement)):
            mean = measure(logits, original.to(logits.device))
            self._sums[index] += float(mean) * logits.shape[0]
        self._tokens += logits.shape[0]

    def result(self) -> Closeness:
        """Gives the means over the windows so far, at least one."""
        return Closeness(*(total / self._tokens for total in self._sums))
