"""The bias that keeps the mean output of a quantised linear while its maps and scales move.

Rounding errors of a weight do not average out where its inputs have a mean: they shift every
token's output by the same vector (arXiv 1906.04721, section 4.2). Each step of a training rounds
anew, so the bias that takes the shift back is a function of the weight and of what was made of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fptq_compiler.graph.edges import Edge, ReorderEdge, WeightEdge
from fptq_compiler.transforms import Side

Means = tuple[Tensor, Tensor]
"""Of a linear's input, (K,) each: exact and as quantised."""


def mean_shift(weight: Tensor, rounded: Tensor, means: Means) -> Tensor:
    """E[x] W - E[x̂] Ŵ (N,) of a weight (N, K), in the dtype of the means."""
    exact, quantized = means
    return weight.to(exact.dtype) @ exact - rounded.to(quantized.dtype) @ quantized


class MeanShift(nn.Module):
    """From a weight (N, K), the same as rounded, and a bias (N,) or None to the bias (N,).

    Attributes:
        mean: (K,) float64, of the input in front of the maps on the weight.
        error: (K,) float64, what the input's quantiser adds to the mean behind them.
    """

    def __init__(self, means: Means, edges: Sequence[Edge]) -> None:
        """Take the means as they are now, and the edges that stand on the weight."""
        super().__init__()
        self._edges: list[WeightEdge | ReorderEdge] = []
        for edge in edges:
            if edge.side is Side.IN:
                assert isinstance(edge, (WeightEdge, ReorderEdge)), f"a {type(edge).__name__} left"
                self._edges.append(edge)
        self.edges = nn.ModuleList(self._edges)
        exact, quantized = (mean.detach().double() for mean in means)
        mean = exact
        with torch.no_grad():
            for edge in reversed(self._edges):
                mean = edge.inputs_before(mean)
        self.register_buffer("mean", mean)
        self.register_buffer("error", quantized - exact)

    def forward(self, weight: Tensor, rounded: Tensor, bias: Tensor | None = None) -> Tensor:
        """The bias in the dtype of the weight; differentiable."""
        exact = self.get_buffer("mean").to(weight.dtype)
        for edge in self._edges:
            exact = edge.inputs(exact)
        quantized = exact + self.get_buffer("error").to(weight.dtype)
        shift = mean_shift(weight, rounded, (exact, quantized))
        return shift if bias is None else bias + shift
