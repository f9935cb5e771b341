"""Choose the next token from logits: greedily, or drawn at a temperature from the likeliest."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fptq_compiler.errors import RuntimeInputError, VerificationError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. The steps apply in this order: temperature, top_k, top_p.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw from the k likeliest tokens; None is all of them.
        top_p: draw from the smallest set of tokens that holds this probability together.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """Refuses settings that leave no token or no distribution.

        Raises:
            RuntimeInputError: naming the setting.
        """
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            message = f"temperature is {self.temperature}, expected 0 or more"
            raise RuntimeInputError(message)
        if self.top_k is not None and self.top_k < 1:
            message = f"top_k is {self.top_k}, expected at least 1"
            raise RuntimeInputError(message)
        if not 0 < self.top_p <= 1:
            message = f"top_p is {self.top_p}, expected above 0 and at most 1"
            raise RuntimeInputError(message)


def choose(
    logits: npt.NDArray[np.floating], sampling: Sampling, generator: np.random.Generator
) -> int:
    """Chooses one token; of equal logits the lower id comes first.

    Args:
        logits: [V].
        sampling: how; greedy choice draws nothing from the generator.
        generator: of the random draw.

    Raises:
        VerificationError: the logits hold NaN or +inf, or nothing but -inf.
    """
    highest = logits.max()
    if not np.isfinite(highest):  # max gives NaN on
        message = f"the model's highest logit is {highest}: it has overflowed, or is damaged"
        raise VerificationError(message)
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities = distribution(logits, sampling)
    return int(generator.choice(probabilities.size, p=probabilities))


def distribution(logits: npt.NDArray[np.floating], sampling: Sampling) -> npt.NDArray[np.float64]:
    """Gives the probability [V] of each token at a temperature above 0.

    Args:
        logits: [V], finite or -inf.
        sampling: its temperature is above 0.
    """
    # The largest is subtracted first: at a tiny temperature the quotients would overflow.
    shifted = (logits.astype(np.float64) - float(logits.max())) / sampling.temperature
    # Ordered before that, for logits apart by less than its rounding are still apart.
    order = np.argsort(-logits, kind="stable")[: sampling.top_k]
    likeliest = np.exp(shifted[order])
    likeliest /= likeliest.sum()
    if sampling.top_p < 1:
        before = np.cumsum(likeliest) - likeliest
        likeliest[before >= sampling.top_p] = 0
    probabilities = np.zeros(logits.size)
    probabilities[order] = likeliest / likeliest.sum()
    return probabilities
