"""Masks by what they hide: the future, and what lies a window behind, are flags and no masks."""

from __future__ import annotations

import torch
from torch.fx import Node

from fptq_compiler.graph import ops
from fptq_compiler.graph.evaluate import Region, ancestors, longest_sequence
from fptq_compiler.graph.program import Program

aten = torch.ops.aten
LONGEST_MASK = 8192
LONGEST_RUN = 2 * LONGEST_MASK + 3
SIZE_ONLY = (
    aten.sym_size.int,
    aten.new_ones.default,
    aten.new_zeros.default,
    aten.ones_like.default,
    aten.zeros_like.default,
)
"""Operators that read no more of an input than its sizes."""
HIDDEN = -1e4


class Masks:
    """Answers, once for each mask, whether it hides exactly the future and the far past."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._answers: dict[Node, int | None] = {}
        bound = longest_sequence(program.module)
        self._longest = min(bound or LONGEST_RUN, LONGEST_RUN)

    def window(self, mask: Node) -> int | None:
        """How many keys a query sees up to itself, 0 for all; None where it is no such mask."""
        if mask not in self._answers:
            self._answers[mask] = self._evaluate(mask)
        return self._answers[mask]

    def _evaluate(self, mask: Node) -> int | None:
        """Compare at every size that can show a difference."""
        behind = ancestors(mask)
        for node in behind:
            if node.op != "placeholder" or "position" in node.name:
                continue
            if any(r in behind and r.target not in SIZE_ONLY for r in node.users):
                return None  # the mask depends on an input's values: it stays as it is
        if any("position" in n.name for n in behind if n.op == "placeholder"):
            return None
        reach = max(
            (abs(a) for n in behind for a in n.args if isinstance(a, int) and abs(a) < 2**31),
            default=0,
        )
        if reach > LONGEST_MASK:
            return None
        sizes = [(1, max(33, 2 * reach + 3)), (1, 1), (2, 7), (3, 13)]
        window: int | None = None
        for batch, sequence in sizes:
            shown = self._shown(mask, batch, min(sequence, self._longest))
            if shown is None or shown.shape[-2] != shown.shape[-1]:
                return None
            if window is None:
                window = _window(shown)
            queries, keys = shown.shape[-2:]
            expected = ops.causal_mask(queries, keys, shown.device, window)
            if not bool((shown == expected).all()):
                return None
        return window

    def _shown(self, mask: Node, batch: int, sequence: int) -> torch.Tensor | None:
        """What the mask shows, as booleans; None where it adds more than zeros and hides."""
        found: torch.Tensor = Region(self._program.module, batch, sequence).value(mask, {})
        if found.dtype == torch.bool:
            return found
        shown = found > HIDDEN
        return shown if bool((found[shown] == 0).all()) else None


def _window(shown: torch.Tensor) -> int:
    """How many keys the last query sees; 0 where it sees all."""
    count = int(shown.reshape(-1, shown.shape[-1])[-1].sum())
    return 0 if count == shown.shape[-1] else count
