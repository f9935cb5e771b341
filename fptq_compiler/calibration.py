"""Token ids to calibrate on: the user's file, the work folder's, or the model's own text."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fptq_compiler.graph.program import Program
from fptq_compiler.graph.stored import held_for_many_runs
from fptq_compiler.progress import Progress
from fptq_compiler.recipe import Recipe
from fptq_compiler.text import (
    load_calibration,
    load_stream,
    load_tokenizer,
    self_generated,
    windows,
)
from fptq_compiler.work import WorkFolder

OWN_ROWS = 32  # sequences that the model writes where it is also trained on them
FEWEST = 8  # training sequences that a short text is cut into
CONTEXT = 16  # tokens that the model looks back while it writes its own text


def training_rows(
    path: Path | None, tokenizer: Path | None, recipe: Recipe, vocabulary: int, ids: Tensor
) -> Tensor:
    """Ids (N, S) for the stages that train: of the calibration file, or what the model wrote.

    A short text is cut into shorter sequences, so that some can be held out.

    Args:
        path: the calibration file.
        tokenizer: for text.
        recipe: its `[blockwise]` and `[training]`.
        vocabulary: ids are below it.
        ids: what the model wrote (N, length), used where there is no file.

    Raises:
        CaptureError: the file or the tokenizer cannot be read, or does not fit the model.
    """
    chosen = recipe.training
    steps = max(chosen.steps, recipe.blockwise.steps)
    if path is not None:
        needs_text = path.suffix != ".npy" and tokenizer is not None
        stream = load_stream(
            path,
            tokenizer=load_tokenizer(tokenizer) if needs_text and tokenizer else None,
            tokens=(steps * chosen.batch + chosen.held_out) * chosen.length,
            vocabulary=vocabulary,
        )
    else:
        stream = ids.flatten()
    length = min(chosen.length, max(2, stream.numel() // FEWEST))
    return windows(stream, length, stream.numel())


def calibration_ids(
    program: Program,
    path: Path | None,
    tokenizer: Path | None,
    recipe: Recipe,
    vocabulary: int,
    start: int | None,
    work: WorkFolder,
    progress: Progress,
) -> tuple[Tensor, str]:
    """Ids (samples, length), or more to train on, and where they are from, in words.

    Raises:
        CaptureError: the file or the tokenizer cannot be read, or does not fit the model.
    """
    samples, length = recipe.calibration.samples, recipe.calibration.length
    written = max(samples, OWN_ROWS) if recipe.trains else samples
    if path is not None:
        needs_text = path.suffix != ".npy" and tokenizer is not None
        found = load_calibration(
            path,
            tokenizer=load_tokenizer(tokenizer) if needs_text and tokenizer else None,
            samples=samples,
            length=length,
            vocabulary=vocabulary,
        )
        return found.ids, f"from {found.origin}"
    kept = work.load_ids()
    if kept is not None:
        return kept, "written by the model itself (from the work folder)"
    progress.start("the model writes its calibration text", length)

    def advance(done: int, total: int) -> None:
        progress.advance(1)

    with torch.no_grad(), held_for_many_runs(program.module):
        found = self_generated(
            program.run,
            vocabulary=vocabulary,
            samples=written,
            length=length,
            seed=recipe.seed,
            start=start,
            progress=advance,
            context=CONTEXT,
        )
    progress.done()
    work.save_ids(found.ids)
    return found.ids, "written by the model itself"
