"""Calibration text that the model writes itself, by a plain forward without a cache."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fptq_compiler.errors import CaptureError

DEFAULT_CONTEXT = 48  # tokens; 8 x 256 tokens of a 135 M model take minutes on two cores


def write_text(
    logits_function: Callable[[torch.Tensor], torch.Tensor],
    *,
    vocabulary: int,
    samples: int,
    length: int,
    generator: torch.Generator,
    start: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    context: int = DEFAULT_CONTEXT,
) -> torch.Tensor:
    """Sample token sequences from a causal model.

    Tokens are sampled at temperature 1 from the whole distribution, so that the text is as
    varied as what the model was trained on. Every sample begins with `start`, or with a token
    drawn uniformly where the model has none. `start` is kept as the first token of every second
    sample only: the first token of a sequence carries the largest activations, and texts in use
    begin with either.

    The model is run without a cache, so each token costs its context. The context is cut to its
    last half whenever it reaches `context` tokens, which makes the cost linear in `length`:
    about 3/4 · context · samples · length tokens through the model.

    Args:
        logits_function: ids [B, S] → logits [B, S, V].
        vocabulary: V; ids of padded rows beyond it are never sampled.
        samples: B, all written at once.
        length: S, tokens per sample.
        generator: on the CPU.
        start: id of the token that begins a text, if known.
        progress: called with (steps done, steps in all); a step writes one token per sample.
        context: the most tokens that the model looks back, at least 2.

    Returns:
        int64 [samples, length].

    Raises:
        CaptureError: the logits are not finite, or there are none for each token.
    """
    total = length if start is None else length + 1
    ids = torch.empty(samples, total, dtype=torch.int64)
    if start is None:
        ids[:, 0] = torch.randint(vocabulary, (samples,), generator=generator)
    else:
        ids[:, 0] = start
    first = 0
    with torch.no_grad():
        for position in range(1, total):
            if position - first >= max(2, context):
                first = position - max(1, context // 2)
            ids[:, position] = _sample(
                logits_function, ids[:, first:position], vocabulary, generator, position
            )
            if progress is not None:
                progress(position, total - 1)
    if start is not None:
        kept = ids[:, :length].clone()
        kept[1::2] = ids[1::2, 1:]
        ids = kept
    return ids


def _sample(
    logits_function: Callable[[torch.Tensor], torch.Tensor],
    context: torch.Tensor,
    vocabulary: int,
    generator: torch.Generator,
    position: int,
) -> torch.Tensor:
    """One token per row, int64 [B], sampled after `context` [B, S]."""
    rows, width = context.shape
    # Programs exported with free sizes assume at least two rows and columns: repeat the row, and
    # add a column behind the last token, which a causal model cannot see.
    padded = context.repeat(2, 1) if rows == 1 else context
    if width == 1:
        padded = torch.cat([padded, padded], dim=1)
    found = logits_function(padded)
    if found.dim() != 3 or found.shape[:2] != padded.shape:
        message = (
            f"self-generated text: the model gives {tuple(found.shape)} for token ids "
            f"{tuple(padded.shape)}, expected logits for each token; this is no language model, "
            "so give calibration text or ids."
        )
        raise CaptureError(message)
    logits = found[:rows, width - 1, :vocabulary].float().cpu()
    if not bool(torch.isfinite(logits).all()):
        message = (
            f"self-generated text: the model's logits for token {position} are not finite. The "
            "weights are damaged, or overflow their type; give calibration text instead."
        )
        raise CaptureError(message)
    return torch.multinomial(torch.softmax(logits, dim=-1), 1, generator=generator)[:, 0]
