"""Perplexity of a stream of tokens, for any function from token ids to logits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from fptq_compiler.errors import CaptureError, RecipeError, VerificationError
from fptq_compiler.progress import Progress, SilentProgress, track

LogitsFunction = Callable[[Tensor], Tensor]
"""From token ids [B, T] int64 to logits [B, T, V]; position t predicts token t + 1."""

_POSITIONS_AT_ONCE: Final = 256
"""Rows of logits in float32 at once: bounds memory where the vocabulary is large."""


@dataclass(frozen=True)
class PerplexityResult:
    """What one evaluation gave.

    Attributes:
        perplexity: exp(nll); inf where that overflows.
        nll: mean negative log-likelihood of a predicted token, in nats.
        tokens: tokens read; each window's first is not predicted.
        windows: forward passes.
        seconds: wall-clock time of all of them.
    """

    perplexity: float
    nll: float
    tokens: int
    windows: int
    seconds: float

    def to_dict(self) -> dict[str, float | int]:
        """Gives the fields by name."""
        return asdict(self)


def perplexity(
    logits_function: LogitsFunction,
    stream_ids: Tensor,
    window: int,
    tokens: int | None = None,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Evaluates non-overlapping windows of the stream; a shorter rest at its end is left out.

    Args:
        logits_function: the model; called with ids [1, window].
        stream_ids: [N] int64, the whole text tokenised once.
        window: tokens of each forward pass, at least 2; tokens 1 to window - 1 are predicted.
        tokens: how many of the stream's first tokens to take; None is all of them.
        progress: who listens.

    Raises:
        RecipeError: the window is too short, or the stream has not one window.
        CaptureError: a token is outside the model's vocabulary.
        VerificationError: logits of another shape, or not a number.
    """
    if window < 2:
        message = f"the window has {window} tokens, expected at least 2: the first predicts only"
        raise RecipeError(message)
    available = stream_ids.numel() if tokens is None else min(tokens, stream_ids.numel())
    windows = available // window
    if windows == 0:
        message = (
            f"{available} tokens do not fill one window of {window}: give a longer text, more "
            "tokens or a shorter window"
        )
        raise RecipeError(message)
    total = 0.0
    start = time.perf_counter()
    listener = SilentProgress() if progress is None else progress
    for index in track(range(windows), listener, "perplexity", windows):
        ids = stream_ids[index * window : (index + 1) * window].reshape(1, window)
        logits = _run(logits_function, ids, index)
        if logits.ndim != 3 or logits.shape[:2] != (1, window):
            message = (
                f"window {index}: the logits have shape {tuple(logits.shape)}, expected "
                f"(1, {window}, vocabulary)"
            )
            raise VerificationError(message)
        nll = _negative_log_likelihood(logits[0, :-1], ids[0, 1:], index)
        total += nll
    mean = total / (windows * (window - 1))
    seconds = time.perf_counter() - start
    return PerplexityResult(_exp(mean), mean, windows * window, windows, seconds)


def _run(logits_function: LogitsFunction, ids: Tensor, index: int) -> Tensor:
    """Runs the model on one window; an embedding raises IndexError where an id is too large."""
    try:
        with torch.no_grad():
            return logits_function(ids)
    except IndexError as error:
        message = (
            f"window {index}: the model refused token ids from {int(ids.min())} to "
            f"{int(ids.max())} ({error}): is this the model's own tokenizer?"
        )
        raise CaptureError(message) from error


def _negative_log_likelihood(logits: Tensor, targets: Tensor, index: int) -> float:
    """Sums -log p(target) in float64 over log-probabilities in float32.

    Args:
        logits: [P, V].
        targets: [P].
        index: the window, for the message.

    Raises:
        CaptureError: a target is outside the vocabulary.
        VerificationError: a sum is not a number.
    """
    vocabulary = logits.shape[1]
    if int(targets.max()) >= vocabulary or int(targets.min()) < 0:
        message = (
            f"window {index}: token id {int(targets.max())} is outside the model's vocabulary "
            f"of {vocabulary}: is this the model's own tokenizer?"
        )
        raise CaptureError(message)
    total = torch.zeros((), dtype=torch.float64)
    for first in range(0, targets.numel(), _POSITIONS_AT_ONCE):
        part = slice(first, first + _POSITIONS_AT_ONCE)
        log_p = torch.log_softmax(logits[part].float(), dim=-1)
        chosen = log_p.gather(1, targets[part, None].to(log_p.device))
        total -= chosen.double().sum().cpu()
    if math.isnan(float(total)):
        message = f"window {index}: the logits hold values that are not numbers (NaN)"
        raise VerificationError(message)
    return float(total)


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def ort_logits(path: Path, threads: int | None = None) -> LogitsFunction:
    """Opens a compiled file in ONNX Runtime as its session file says; a cache stays empty.

    Args:
        path: the file; external data and session file lie beside it.
        threads: within one operator; None leaves it to ONNX Runtime.

    Returns:
        A function from ids [B, T] to logits [B, T, V] float32.

    Raises:
        RuntimeLoadError: not an ONNX file from token ids to logits, or not a whole one.
    """
    from fptq_compiler.runtime.session import load

    model = load(path, threads=threads)

    def logits(ids: Tensor) -> Tensor:
        """Runs the file: ids [B, T] to logits [B, T, V]."""
        found, _ = model.step(ids.numpy(force=True), model.start(ids.shape[0]))
        return torch.from_numpy(found)

    return logits
