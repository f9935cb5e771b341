"""RoPE that changes its angles with the length of the sequence, held at the original length.

"Dynamic NTK" scaling recomputes all angles, in a branch on the values of the positions, for
sequences longer than the model was trained on, and keeps the new ones. Up to that length it is
plain RoPE, and that is what a graph can hold; the capture is then bounded by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PLAIN = "default"
FREQUENCIES = "inv_freq"


@contextmanager
def original_angles(model: Any) -> Iterator[int | None]:
    """Keep dynamic RoPE from branching; gives the bound in tokens, None where there is none."""
    saved: list[tuple[Any, str, Any]] = []
    lengths: list[int] = []
    for part in model.modules():
        prefixes = _dynamic_prefixes(part)
        if not prefixes:
            continue
        lengths.append(int(part.original_max_seq_len))
        saved.append((part, "rope_type", part.rope_type))
        part.rope_type = _plain(part.rope_type)
        for prefix in prefixes:
            name = f"{prefix}{FREQUENCIES}"
            saved.append((part, name, getattr(part, name)))
            setattr(part, name, getattr(part, f"{prefix}original_{FREQUENCIES}"))
    try:
        yield min(lengths, default=None)
    finally:
        for part, name, value in saved:
            setattr(part, name, value)


def _dynamic_prefixes(part: Any) -> list[str]:
    """Of the names of its frequencies; a model may have a RoPE for each type of layer."""
    kind = getattr(part, "rope_type", None)
    if isinstance(kind, dict):
        return [f"{layer}_" for layer, k in kind.items() if "dynamic" in k]
    return [""] if isinstance(kind, str) and "dynamic" in kind else []


def _plain(kind: Any) -> Any:
    if isinstance(kind, dict):
        return {layer: PLAIN if "dynamic" in k else k for layer, k in kind.items()}
    return PLAIN
