"""Prove by running that a raised attention computes what was spelled out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fptq_compiler.graph.evaluate import Region

EXACT = 1e-9  # relative, float64
SIZES = ((2, 13), (3, 6))


class AttentionProof:
    """Compares two nodes of one graph on random operands and masks, at two sizes."""

    def __init__(self, module: GraphModule) -> None:
        self._regions = [Region(module, batch, sequence) for batch, sequence in SIZES]

    def error(
        self, old: Node, new: Node, operands: Sequence[Node], masks: Sequence[Node]
    ) -> float:
        """The largest difference, relative to the largest value."""
        worst = 0.0
        for region in self._regions:
            generator = torch.Generator().manual_seed(11)
            bound = {n: _values(region.shape(n), generator) for n in operands}
            for mask in masks:
                if mask.op != "get_attr":
                    bound[mask] = _mask(region.shape(mask), mask.meta["val"].dtype, generator)
            expected = region.value(old, bound)
            try:
                found = region.value(new, bound)
            except RuntimeError:  # shapes that do not fit
                return float("inf")
            if expected.shape != found.shape:
                return float("inf")
            difference = float((expected - found).abs().max() / expected.abs().max())
            worst = max(worst, difference) if difference == difference else float("inf")
        return worst


def _values(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return 2 * torch.randn(tuple(shape), generator=generator, dtype=torch.float64)


def _mask(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Numbers to add, or booleans that show some keys and always a query's own."""
    if dtype.is_floating_point:
        return _values(shape, generator)
    shown = torch.rand(tuple(shape), generator=generator) > 0.5
    queries, keys = shown.shape[-2:]
    return (shown | torch.eye(queries, keys, dtype=torch.bool)).to(dtype)
