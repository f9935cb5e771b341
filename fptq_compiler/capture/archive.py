"""Load a torch.export archive (.pt2, .pt) that nobody has vouched for.

`torch.export.load` unpickles and evaluates parts of the file. So every part is checked first,
then the same open file is handed to torch, with full unpickling switched off for that time.
The example inputs, which only torch's own tools need, are not read at all.
"""

from __future__ import annotations

import importlib
import logging
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO

import torch

from fptq_compiler.capture.archive_parts import ArchiveParts, check_payloads
from fptq_compiler.capture.archive_reader import plain_reader
from fptq_compiler.capture.program_text import check_program_text
from fptq_compiler.errors import CaptureError

EXPERTS = "transformers.integrations.moe"
"""Registers the operator that transformers exports a mixture of experts with."""

logger = logging.getLogger(__name__)

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_FORCE_NOT = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def load_archive(path: Path, *, trust_pickle: bool = False) -> torch.export.ExportedProgram:
    """Check a torch.export archive and load it.

    Args:
        path: the file; its name and extension do not matter.
        trust_pickle: also load parts that run code while they are unpickled. The graph's own
            text is checked all the same.

    Returns:
        The program, with parameters under the names that they had when it was exported.

    Raises:
        CaptureError: naming the part that is damaged or not safe.
    """
    origin = path.name
    with path.open("rb") as file:
        try:
            zipped = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            message = (
                f"{origin}: the archive is truncated or damaged ({error}). "
                "Copy the file again, or write it again with torch.export.save."
            )
            raise CaptureError(message) from None
        with zipped:
            _check_archive(zipped, origin, trust_pickle=trust_pickle)
        file.seek(0)
        return _load_checked(file, origin, trust_pickle=trust_pickle)


def _check_archive(zipped: zipfile.ZipFile, origin: str, *, trust_pickle: bool) -> None:
    parts = ArchiveParts(zipped, origin)
    parts.check_checksums()
    if parts.read("archive_format").strip() != b"pt2":
        message = (
            f"{origin}: archive_format is {parts.read('archive_format')[:20]!r}, expected b'pt2'. "
            "Write the file with torch.export.save."
        )
        raise CaptureError(message)
    check_program_text(parts.read_json("models/model.json"), f"{origin}: models/model.json")
    check_payloads(parts, origin, trust_pickle=trust_pickle)


def _load_checked(
    file: IO[bytes], origin: str, *, trust_pickle: bool
) -> torch.export.ExportedProgram:
    importlib.import_module(EXPERTS)
    try:
        with plain_reader(), nullcontext() if trust_pickle else _weights_only():
            return torch.export.load(file)
    except Exception as error:
        reason = str(error.__context__ or error).strip() or type(error).__name__
        message = (
            f"{origin}: torch {torch.__version__} cannot read this archive: {reason[-400:]}. "
            "Export the model again with this version of torch."
        )
        raise CaptureError(message) from error


@contextmanager
def _weights_only() -> Iterator[None]:
    """Make every `torch.load` inside refuse full pickles, also where torch asks for one."""
    before = {name: os.environ.get(name) for name in (_FORCE, _FORCE_NOT)}
    os.environ[_FORCE] = "1"
    os.environ.pop(_FORCE_NOT, None)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
