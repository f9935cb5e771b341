"""Merge transforms into the weights: evaluate the edges in float64, keep the parameter."""

from __future__ import annotations

from fptq_compiler.graph.edges import fold
from fptq_compiler.graph.pipeline import Pass, PassResult
from fptq_compiler.graph.program import Program
from fptq_compiler.transforms import Map


class FoldTransforms(Pass):
    """The one fold: only maps that are still to be trained, and online parts, remain."""

    requires = ("sites_found",)
    provides = ("folded",)
    rounds = True

    def __init__(self, trained: tuple[Map, ...] = ()) -> None:
        """Take the maps that stay on their edges."""
        self.trained = trained

    def run(self, program: Program) -> PassResult:
        """Fold every chain of edges as far as it is settled."""
        return PassResult(fold(program, self.trained))
