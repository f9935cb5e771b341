"""RoPE that changes its angles with the length of the sequence, held at the original length.

"Dynamic NTK" scaling recomputes all angles, in a branch on the values of the positions, for
sequences longer than the model was trained on. Up to that length it is plain RoPE, and that is
what a graph can hold; the capture is then bounded by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PLAIN = "default"


@contextmanager
def original_angles(model: Any) -> Iterator[int | None]:
    """Keep dynamic RoPE from branching; gives the bound in tokens, None where there is none."""
    changed: list[tuple[Any, Any]] = []
    lengths: list[int] = []
    for part in model.modules():
        kind = getattr(part, "rope_type", None)
        if isinstance(kind, str) and "dynamic" in kind:
            changed.append((part, kind))
            part.rope_type = PLAIN
            lengths.append(int(part.original_max_seq_len))
        elif isinstance(kind, dict) and any("dynamic" in k for k in kind.values()):
            changed.append((part, kind))
            part.rope_type = {n: PLAIN if "dynamic" in k else k for n, k in kind.items()}
            lengths.append(int(part.original_max_seq_len))
    try:
        yield min(lengths, default=None)
    finally:
        for part, kind in changed:
            part.rope_type = kind
