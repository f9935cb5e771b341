"""Token ids for calibration and evaluation: from a file, or written by the model itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from fptq_compiler.errors import CaptureError
from fptq_compiler.text_rows import Tokenizer, encode, load_array, load_rows, require_tokenizer
from fptq_compiler.text_sampling import DEFAULT_CONTEXT, write_text

_NUMPY_MAGIC = b"\x93NUMPY"
_CHARACTERS_PER_TOKEN = 16  # four times what is usual: enough text for a limit in one go
_MARGIN = 64  # tokens at a cut that are not kept, as the text after it could change them


@dataclass(frozen=True)
class TokenSet:
    """Token sequences of one length.

    Attributes:
        ids: int64 [samples, length].
        origin: base name of the file, or "self-generated", for reports.
    """

    ids: torch.Tensor
    origin: str


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer from this machine.

    Args:
        path: a folder, a GGUF file or a tokenizer.json.

    Raises:
        CaptureError: there is no tokenizer, or transformers cannot read it.
    """
    if not path.exists():
        message = f"{path}: no such tokenizer. Name a folder, a GGUF file or a tokenizer.json."
        raise CaptureError(message)
    try:
        if path.is_dir():
            return transformers.AutoTokenizer.from_pretrained(
                str(path), local_files_only=True, trust_remote_code=False
            )
        with path.open("rb") as file:
            gguf_file = file.read(4) == b"GGUF"
        if gguf_file:
            return transformers.AutoTokenizer.from_pretrained(
                str(path.parent), gguf_file=path.name, local_files_only=True
            )
        return transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    except Exception as error:  # tokenizers and transformers raise many types
        reason = str(error).strip()[:300] or type(error).__name__
        message = (
            f"{path.name}: the tokenizer cannot be loaded: {reason}. Name the folder that the "
            "model came with, or give token ids in a .npy file."
        )
        raise CaptureError(message) from error


def token_stream(path: Path, tokenizer: Tokenizer, limit: int | None = None) -> torch.Tensor:
    """Tokenise a whole text file once, without special tokens.

    Args:
        path: UTF-8 text.
        tokenizer: as `load_tokenizer` gives it.
        limit: number of tokens to keep, None for all. A long file is then read only as far as
            needed.

    Returns:
        int64 [tokens].

    Raises:
        CaptureError: the file is empty or not UTF-8.
    """
    text = _read_text(path)
    if not text.strip():
        message = f"{path.name}: the file is empty, expected text."
        raise CaptureError(message)
    if limit is not None:
        enough = (limit + _MARGIN) * _CHARACTERS_PER_TOKEN
        if enough < len(text):
            stream = encode(text[:enough], tokenizer)
            if stream.numel() >= limit + _MARGIN:
                return stream[:limit]
    stream = encode(text, tokenizer)
    return stream if limit is None else stream[:limit]


def windows(stream: torch.Tensor, length: int, count: int) -> torch.Tensor:
    """Cut a stream into consecutive windows that do not overlap.

    Args:
        stream: int64 [tokens].
        length: tokens per window, at least 1.
        count: the most windows to cut.

    Returns:
        int64 [min(count, tokens // length), length].

    Raises:
        CaptureError: not even one window fits.
    """
    available = stream.numel() // length
    if available == 0:
        message = (
            f"found {stream.numel()} tokens, expected at least {length} for one sample. Give "
            "more text or a smaller sample length."
        )
        raise CaptureError(message)
    taken = min(count, available)
    return stream[: taken * length].reshape(taken, length)


def load_calibration(
    path: Path, *, tokenizer: Tokenizer | None, samples: int, length: int, vocabulary: int
) -> TokenSet:
    """Read calibration samples from token ids or text.

    Args:
        path: .npy (integers, 1-D stream or 2-D rows), .jsonl (a "text" or "input_ids" per line)
            or else UTF-8 text. A NumPy file is recognised by its content.
        tokenizer: needed for text only.
        samples: the most samples to take.
        length: tokens per sample.
        vocabulary: ids must be in [0, vocabulary).

    Returns:
        At most `samples` rows: rows of a 2-D array are cut to `length`, streams into windows.

    Raises:
        CaptureError: naming the file, the row or position, and what was expected.
    """
    ids = _load_ids(path, tokenizer, samples * length, vocabulary)
    try:
        if ids.ndim == 1:
            return TokenSet(windows(ids, length, samples).contiguous(), path.name)
        if ids.shape[1] < length:
            message = f"rows have {ids.shape[1]} tokens, expected at least {length} for one sample"
            raise CaptureError(message)
    except CaptureError as error:
        message = f"{path.name}: {error}"
        raise CaptureError(message) from None
    return TokenSet(ids[:samples, :length].contiguous(), path.name)


def load_stream(
    path: Path, *, tokenizer: Tokenizer | None, tokens: int, vocabulary: int
) -> torch.Tensor:
    """Read training tokens from the same files as calibration: int64 [at most `tokens`].

    Raises:
        CaptureError: naming the file, the row or position, and what was expected.
    """
    return _load_ids(path, tokenizer, tokens, vocabulary).flatten()[:tokens]


def self_generated(
    logits_function: Callable[[torch.Tensor], torch.Tensor],
    *,
    vocabulary: int,
    samples: int,
    length: int,
    seed: int,
    start: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    context: int = DEFAULT_CONTEXT,
) -> TokenSet:
    """Let the model write its own calibration text (data-free calibration).

    How it is sampled, and what it costs, stands in `text_sampling.write_text`.

    Args:
        logits_function: ids [B, S] → logits [B, S, V].
        vocabulary: V; ids of padded rows beyond it are never sampled.
        samples: B, all written at once.
        length: S, tokens per sample.
        seed: of the generator.
        start: id of the token that begins a text, if known.
        progress: called with (tokens written, tokens in all) per sample.
        context: the most tokens that the model looks back, at least 2.

    Raises:
        CaptureError: the logits are not finite.
    """
    ids = write_text(
        logits_function,
        vocabulary=vocabulary,
        samples=samples,
        length=length,
        generator=torch.Generator().manual_seed(seed),
        start=start,
        progress=progress,
        context=context,
    )
    return TokenSet(ids, "self-generated")


def _load_ids(
    path: Path, tokenizer: Tokenizer | None, needed: int, vocabulary: int
) -> torch.Tensor:
    """Ids [tokens] or [rows, tokens], of text no more than about `needed`."""
    if not path.is_file():
        message = f"{path}: no such file. Name a .npy, .jsonl or text file."
        raise CaptureError(message)
    with path.open("rb") as file:
        head = file.read(len(_NUMPY_MAGIC))
    if not head:
        message = f"{path.name}: the file is empty, expected token ids or text."
        raise CaptureError(message)
    if head == _NUMPY_MAGIC or path.suffix == ".npy":
        ids = load_array(path)
    elif path.suffix == ".jsonl":
        ids = load_rows(path, tokenizer, needed=needed)
    else:
        ids = token_stream(path, require_tokenizer(tokenizer, path.name), needed)
    _check_range(ids, vocabulary, path.name)
    return ids


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        message = f"{path.name}: expected UTF-8 text ({error}). Convert the file."
        raise CaptureError(message) from None


def _check_range(ids: torch.Tensor, vocabulary: int, where: str) -> None:
    """Name the first id outside [0, vocabulary)."""
    wrong = ((ids < 0) | (ids >= vocabulary)).nonzero()
    if wrong.numel():
        place = tuple(int(index) for index in wrong[0])
        position = f"position {place[0]}" if len(place) == 1 else f"row {place[0]}, {place[1]}"
        share = math.ceil(100 * wrong.shape[0] / ids.numel())
        message = (
            f"{where}: token id {int(ids[place])} at {position} is outside [0, {vocabulary}) "
            f"(about {share} % of all ids are). The ids were made with another tokenizer."
        )
        raise CaptureError(message)
