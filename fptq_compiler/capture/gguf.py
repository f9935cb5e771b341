"""Capture a GGUF file: transformers reads the architecture and dequantises the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fptq_compiler.capture.gguf_header import check_gguf
from fptq_compiler.capture.huggingface import load_pretrained


def load_gguf(path: Path, *, dtype: torch.dtype | None = torch.float32) -> Any:
    """Load the model of a GGUF file.

    Args:
        path: the file; its name does not matter.
        dtype: type of the weights in memory; None keeps what transformers chooses.

    Returns:
        The transformers model, in evaluation mode, weights dequantised.

    Raises:
        CaptureError: the file is damaged, or transformers does not know the architecture.
    """
    check_gguf(path)
    options = {"gguf_file": path.name}
    return load_pretrained(path.parent, options, dtype=dtype or "auto", origin=path.name)
