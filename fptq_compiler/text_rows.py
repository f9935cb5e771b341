"""Read token ids from rows: NumPy arrays and JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fptq_compiler.errors import CaptureError

Tokenizer = Any  # a transformers tokenizer


def encode(text: str, tokenizer: Tokenizer) -> torch.Tensor:
    """Tokenise a text of any length without special tokens: int64 [tokens]."""
    # verbose=False: the tokenizer would warn that the text is longer than the model's window.
    encoded = tokenizer(text, add_special_tokens=False, verbose=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


def require_tokenizer(tokenizer: Tokenizer | None, where: str) -> Tokenizer:
    """Return the tokenizer, or say what is missing.

    Raises:
        CaptureError: there is none.
    """
    if tokenizer is None:
        message = (
            f"{where}: text needs a tokenizer, and the model has none. Name one, or give token "
            "ids in a .npy file."
        )
        raise CaptureError(message)
    return tokenizer


def load_array(path: Path) -> torch.Tensor:
    """Integer token ids of a .npy file, int64 [tokens] or [rows, tokens].

    Raises:
        CaptureError: objects (a pickle), numbers that are no integers, another rank, or nothing.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        message = (
            f"{path.name}: cannot be read as plain numbers ({error}). Expected a .npy file of "
            "integers, written with numpy.save."
        )
        raise CaptureError(message) from None
    if not isinstance(array, np.ndarray) or not np.issubdtype(array.dtype, np.integer):
        found = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        message = f"{path.name}: expected integer token ids, found {found}."
        raise CaptureError(message)
    if array.ndim not in (1, 2) or array.size == 0:
        message = f"{path.name}: expected [tokens] or [rows, tokens], found {list(array.shape)}."
        raise CaptureError(message)
    if array.dtype == np.uint64 and int(array.max()) > np.iinfo(np.int64).max:
        message = f"{path.name}: token id {int(array.max())} is no token id."
        raise CaptureError(message)
    return torch.from_numpy(array.astype(np.int64))


def load_rows(path: Path, tokenizer: Tokenizer | None, *, needed: int) -> torch.Tensor:
    """The ids of all rows of a .jsonl file as one stream, no further than `needed` tokens.

    Raises:
        CaptureError: naming the row that is not as expected, or an empty file.
    """
    pieces: list[torch.Tensor] = []
    found = 0
    for number, row in _rows(path):
        piece = _row_ids(row, tokenizer, f"{path.name}, row {number}")
        pieces.append(piece)
        found += piece.numel()
        if found >= needed:
            break
    if not pieces:
        message = f"{path.name}: the file has no rows, expected one JSON object per line."
        raise CaptureError(message)
    return torch.cat(pieces)


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except UnicodeDecodeError as error:
        message = f"{path.name}: expected UTF-8 ({error}). Convert the file."
        raise CaptureError(message) from None


def _row_ids(line: str, tokenizer: Tokenizer | None, where: str) -> torch.Tensor:
    try:
        row = json.loads(line)
    except ValueError as error:
        message = f"{where}: not JSON ({error}). Expected one object per line."
        raise CaptureError(message) from None
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return encode(row["text"], require_tokenizer(tokenizer, where))
    ids = row.get("input_ids") if isinstance(row, dict) else None
    if isinstance(ids, list) and all(type(item) is int for item in ids):
        if any(abs(item) > np.iinfo(np.int64).max for item in ids):
            message = f"{where}: holds a number that is no token id."
            raise CaptureError(message)
        return torch.tensor(ids, dtype=torch.int64)
    keys = sorted(row) if isinstance(row, dict) else type(row).__name__
    message = (
        f'{where}: expected {{"text": a string}} or {{"input_ids": a list of integers}}, '
        f"found {keys}."
    )
    raise CaptureError(message)
