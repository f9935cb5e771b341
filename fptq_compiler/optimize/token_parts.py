"""Means over tokens of what logits give, a few tokens at a time, the gradient with the value.

A vocabulary makes logits the largest values of a step. Here they, their softmaxes and their
gradients exist for TOKENS_AT_ONCE tokens only: the last linear is given with what it reads, and
what is kept for the backward pass is the gradient of that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TOKENS_AT_ONCE = 128
"""Whose logits are computed together: one read of the last weight."""
VALUES_AT_ONCE = 1 << 19
"""Of them, on a CPU, the logits whose softmaxes are: some buffers of these fit into its caches."""


def themselves(logits: Tensor) -> Tensor:
    """Logits that are there already."""
    return logits


@dataclass(frozen=True)
class Logits:
    """Logits [..., V] by what they are computed from.

    Attributes:
        tokens: [..., n], what the last linear reads of each token.
        shared: what it reads for all of them, such as its weight.
        of: from tokens [N, n] and `shared` to logits [N, V].
    """

    tokens: Tensor
    shared: tuple[Tensor, ...] = ()
    of: Callable[..., Tensor] = themselves

    @property
    def rows(self) -> Tensor:
        """The tokens as [N, n]."""
        return self.tokens.reshape(-1, self.tokens.shape[-1])

    def whole(self) -> Tensor:
        """All logits [..., V], with gradients."""
        return self.of(self.tokens, *self.shared)


Given = Tensor | Logits
Slope = Callable[..., tuple[Tensor, Tensor]]
"""From logits [N, V] and what is given for the same tokens to a sum over them [] and its gradient
to the logits [N, V], both float32."""


def mean_over_tokens(slope: Slope, student: Given, *given: Given) -> Tensor:
    """The mean over all tokens, float32 []; gradients flow to the student alone.

    Args:
        slope: the sum over some tokens, and its gradient.
        student: logits [..., V].
        given: what `slope` reads beside the student's logits, [..., n] each.

    Raises:
        ValueError: the tokens are not as many, or none.
    """
    asked, *others = (x if isinstance(x, Logits) else Logits(x) for x in (student, *given))
    sizes = [tuple(x.tokens.shape[:-1]) for x in (asked, *others)]
    if len(set(sizes)) > 1 or asked.tokens.numel() == 0:
        message = (
            f"the logits are of {' and '.join(map(str, sizes))} tokens; "
            "expected as many, and some"
        )
        raise ValueError(message)
    tokens = asked.rows
    total: Tensor = _SumOverParts.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
        slope, others, asked.of, tokens, *asked.shared
    )
    return total / len(tokens)


class _SumOverParts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, slope: Slope, given: Sequence[Logits], of: Callable[..., Tensor],
        *inputs: Tensor,
    ) -> Tensor:
        needed = ctx.needs_input_grad[3:]
        tokens, *shared = inputs
        total = torch.zeros((), device=tokens.device)
        gradients = [
            torch.zeros_like(x) if need else None for x, need in zip(inputs, needed, strict=True)
        ]
        for start in range(0, len(tokens), TOKENS_AT_ONCE):
            part = slice(start, start + TOKENS_AT_ONCE)
            read = [
                x.detach().requires_grad_(need)
                for x, need in zip((tokens[part], *shared), needed, strict=True)
            ]
            with torch.enable_grad():
                logits = of(*read)
            beside = [g.of(g.rows[part], *g.shared) for g in given]
            gradient = torch.empty_like(logits)
            for piece in _pieces(logits):
                value, gradient[piece] = slope(logits[piece].detach(), *(x[piece] for x in beside))
                total += value
            if not logits.requires_grad:
                continue
            learning = [x for x in read if x.requires_grad]
            found = iter(torch.autograd.grad(logits, learning, gradient))
            sums = [gradients[0] if gradients[0] is None else gradients[0][part], *gradients[1:]]
            for whole in sums:
                if whole is not None:
                    whole += next(found)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        found = (None if g is None else g * outer[0] for g in ctx.saved_tensors)
        return None, None, None, *found


def _pieces(logits: Tensor) -> Iterator[slice]:
    """The tokens of logits [N, V] whose softmaxes are computed together."""
    tokens, vocabulary = logits.shape
    size = max(1, VALUES_AT_ONCE // vocabulary) if logits.device.type == "cpu" else tokens
    return (slice(start, start + size) for start in range(0, tokens, size))
