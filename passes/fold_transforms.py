"""Merge every transform into the weights: evaluate the edges in float64, keep the parameter."""

from __future__ import annotations

from fptq_compiler.graph.edges import fold
from fptq_compiler.graph.pipeline import Pass, PassResult
from fptq_compiler.graph.program import Program


class FoldTransforms(Pass):
    """The one fold: afterwards no weight edge is left, and online parts alone remain."""

    requires = ("sites_found",)
    provides = ("folded",)
    rounds = True

    def run(self, program: Program) -> PassResult:
        """Fold every chain of edges."""
        return PassResult(fold(program))
