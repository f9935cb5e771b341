"""Perplexity of a stream of tokens, for any function from token ids to logits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from fptq_compiler.errors import RecipeError
from fptq_compiler.likelihood import LogitsFunction, log_likelihood, run_model
from fptq_compiler.progress import Progress, SilentProgress, track


@dataclass(frozen=True)
class PerplexityResult:
    """What one evaluation gave.

    Attributes:
        perplexity: exp(nll); inf where that overflows.
        nll: mean negative log-likelihood of a predicted token, in nats.
        tokens: tokens read; each window's first is not predicted.
        windows: forward passes.
        seconds: wall-clock time of all of them, a comparison included.
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
    compare: Callable[[Tensor, Tensor], None] | None = None,
) -> PerplexityResult:
    """Evaluates non-overlapping windows of the stream; a shorter rest at its end is left out.

    Args:
        logits_function: the model; called with ids [1, window].
        stream_ids: [N] int64, the whole text tokenised once.
        window: tokens of each forward pass, at least 2; tokens 1 to window - 1 are predicted.
        tokens: how many of the stream's first tokens to take; None is all of them.
        progress: who listens.
        compare: called with the ids [1, window] and the logits [window - 1, V] that predict
            tokens 1 to window - 1, for another measure on the same windows.

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
        where = f"window {index}"
        logits = run_model(logits_function, ids, where)[0, :-1]
        total -= log_likelihood(logits, ids[0, 1:], where)
        if compare is not None:
            compare(ids, logits)
    mean = total / (windows * (window - 1))
    seconds = time.perf_counter() - start
    return PerplexityResult(_exp(mean), mean, windows * window, windows, seconds)


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

    return logits if model.batch is None else _in_batches(logits, model.batch)


def _in_batches(logits_function: LogitsFunction, size: int) -> LogitsFunction:
    """Runs `size` sequences at once, the last one repeated to fill up."""

    def logits(ids: Tensor) -> Tensor:
        """Runs the file: ids [B, T] to logits [B, T, V]."""
        parts = []
        for part in torch.split(ids, size):
            rows = torch.arange(size).clamp_max(part.shape[0] - 1)
            parts.append(logits_function(part[rows]))
        return torch.cat(parts)[: ids.shape[0]]

    return logits
