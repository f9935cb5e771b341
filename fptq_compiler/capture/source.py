"""Decide what the user named, by looking inside, and capture it."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from fptq_compiler.capture.archive import load_archive
from fptq_compiler.capture.export_dynamic import export_dynamic
from fptq_compiler.capture.finite import refuse_non_finite
from fptq_compiler.capture.gguf import load_gguf
from fptq_compiler.capture.gguf_header import MAGIC
from fptq_compiler.capture.huggingface import (
    context_length,
    export_causal_lm,
    generation_start,
    load_huggingface,
    load_unread,
    read_config,
    text_ends,
)
from fptq_compiler.capture.pickled import load_pickled
from fptq_compiler.errors import CaptureError
from fptq_compiler.graph.stored import Source

logger = logging.getLogger(__name__)

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Captured:
    """A model as the compiler takes it in.

    Attributes:
        program: input ids [B, S] → logits [B, S, V] (or what a given archive computes).
        kind: "archive", "huggingface", "gguf", "pickle" or "module".
        origin: what the user named, for messages; metadata uses only its base name.
        tokenizer: folder or GGUF file with the model's own tokenizer, if there is one.
        generation_start: token id that begins a text (bos, else eos), if the config says.
        text_ends: token ids that end a text.
        context_length: the longest sequence the model was made for, if the config says.
        sources: by parameter name where its values lie, if the program holds none.
    """

    program: torch.export.ExportedProgram
    kind: str
    origin: str
    tokenizer: Path | None
    generation_start: int | None = None
    text_ends: tuple[int, ...] = ()
    context_length: int | None = None
    sources: Mapping[str, Source] = field(default_factory=dict)


def capture(
    source: str | Path | torch.nn.Module | torch.export.ExportedProgram,
    *,
    trust_pickle: bool = False,
    example_inputs: tuple[Any, ...] | None = None,
    unread: bool = False,
) -> Captured:
    """Turn a model input of any kind into an `ExportedProgram`.

    Args:
        source: a path (torch.export archive, Hugging Face folder, GGUF file, pickled module), a
            module or an exported program.
        trust_pickle: allow loading that runs code from the file.
        example_inputs: positional example inputs, for modules that are not transformers models.
        unread: leave weights in their files where that can be; the program then holds none, and
            `Captured.sources` says where they are.

    Raises:
        CaptureError: the input is missing, not understood, damaged, not safe, or holds NaN.
    """
    if isinstance(source, torch.export.ExportedProgram):
        captured = Captured(source, "module", "exported program", None)
    elif isinstance(source, torch.nn.Module):
        captured = _capture_module(source, "module", type(source).__name__, example_inputs)
    else:
        captured = _capture_path(Path(source), trust_pickle, example_inputs, unread)
    refuse_non_finite(captured.program, captured.sources)
    logger.info("captured %s as %s", captured.origin, captured.kind)
    return captured


def _capture_path(
    path: Path, trust_pickle: bool, example_inputs: tuple[Any, ...] | None, unread: bool
) -> Captured:
    if not path.exists():
        message = f"{path}: no such file or folder. Give a model file or a checkpoint folder."
        raise CaptureError(message)
    if path.is_dir():
        return _capture_folder(path, trust_pickle, unread)
    kind = identify(path)
    if kind == "gguf":
        return _capture_gguf(path)
    if kind == "archive":
        program = load_archive(path, trust_pickle=trust_pickle)
        return Captured(program, "archive", str(path), _tokenizer_of(path.parent))
    module = load_pickled(path, trust_pickle=trust_pickle)
    return _capture_module(module, "pickle", str(path), example_inputs)


def identify(path: Path) -> str:
    """What a file is, by its first bytes and, for a zip file, its parts.

    Returns:
        "archive", "gguf" or "pickle".

    Raises:
        CaptureError: anything else, or an archive of before torch 2.8.
    """
    with path.open("rb") as file:
        head = file.read(4)
    if head == MAGIC:
        return "gguf"
    if head[:2] == b"PK":
        return _identify_zip(path)
    if len(head) >= 2 and head[0] == 0x80 and 2 <= head[1] <= 5:
        return "pickle"
    found = "an empty file" if not head else f"a file that begins with {head!r}"
    message = (
        f"{path.name}: expected a torch.export archive, a GGUF file or a Hugging Face folder, "
        f"found {found}. Save the model with torch.export.save(torch.export.export(...))."
    )
    raise CaptureError(message)


def _identify_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as zipped:
            names = zipped.namelist()
            start = min((entry.header_offset for entry in zipped.infolist()), default=0)
        if start != 0:  # without its own end, a zip file inside it is found instead
            reason = f"its directory describes only what follows byte {start}"
            raise zipfile.BadZipFile(reason)
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        message = (
            f"{path.name}: the archive is truncated or damaged ({error}). "
            "Copy the file again, or write it again with torch.export.save."
        )
        raise CaptureError(message) from None
    inner = {name.partition("/")[2] for name in names}
    if "serialized_exported_program.json" in names:
        message = (
            f"{path.name}: this archive has the layout of before torch 2.8, expected that of "
            f"torch {torch.__version__}. Export the model again with torch.export.save."
        )
        raise CaptureError(message)
    if "archive_format" in inner:
        return "archive"
    if "data.pkl" in inner:
        return "pickle"
    message = (
        f"{path.name}: a zip file, but neither a torch.export archive nor a saved module; it "
        f"holds {', '.join(names[:3]) or 'nothing'}. Save the model with torch.export.save."
    )
    raise CaptureError(message)


def _capture_folder(folder: Path, trust_pickle: bool, unread: bool) -> Captured:
    if (folder / "config.json").exists():
        read_config(folder)
        tokenizer = _tokenizer_of(folder)
        lazy = load_unread(folder) if unread else None
        model, sources = lazy or (load_huggingface(folder, trust_pickle=trust_pickle), {})
        return _captured(model, "huggingface", str(folder), tokenizer, sources=sources)
    files = sorted(folder.glob("*.gguf"))
    if len(files) == 1:
        return _capture_gguf(files[0])
    found = f"{len(files)} GGUF files" if files else "neither"
    message = (
        f"{folder.name}: expected a folder with config.json or with one GGUF file, found {found}."
        " Name the file itself, or a Hugging Face checkpoint folder."
    )
    raise CaptureError(message)


def _capture_gguf(path: Path) -> Captured:
    model = load_gguf(path)
    return _captured(model, "gguf", str(path), path)


def _capture_module(
    module: torch.nn.Module, kind: str, origin: str, example_inputs: tuple[Any, ...] | None
) -> Captured:
    if isinstance(module, transformers.PreTrainedModel):
        ids = example_inputs[0] if example_inputs else None
        return _captured(module, kind, origin, None, ids)
    if example_inputs is None:
        message = (
            f"{origin}: a module can only be exported with example inputs, found none. Give token "
            "ids of shape [batch, sequence]."
        )
        raise CaptureError(message)
    program = export_dynamic(module, example_inputs, origin=origin)
    return Captured(program, kind, origin, None)


def _captured(
    model: transformers.PreTrainedModel,
    kind: str,
    origin: str,
    tokenizer: Path | None,
    ids: torch.Tensor | None = None,
    sources: Mapping[str, Source] | None = None,
) -> Captured:
    """Export a transformers model, and keep what its config says of texts."""
    return Captured(
        export_causal_lm(model, ids, sources), kind, origin, tokenizer,
        generation_start(model.config), text_ends(model.config), context_length(model.config),
        sources or {},
    )


def _tokenizer_of(folder: Path) -> Path | None:
    """The folder, if it holds a tokenizer."""
    return folder if any((folder / name).exists() for name in _TOKENIZER_FILES) else None
