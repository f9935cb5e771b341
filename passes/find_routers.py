"""Find the linears that choose experts: what they give goes to a top-k.

An error there does not blur a value, it runs another expert. They are a thousandth of a model's
weights, and stay in float.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fptq_compiler.graph.pipeline import Effect, Pass, PassResult
from fptq_compiler.graph.program import Program
from fptq_compiler.passes.linears import linear_ref, nearest_linears

aten = torch.ops.aten


class FindRouters(Pass):
    """Fill `program.sites.routers`."""

    requires = ("canonical",)
    provides = ("routers_found",)
    effect = Effect.ANALYSES

    def run(self, program: Program) -> PassResult:
        """Look behind every top-k for the linears that feed it."""
        nodes = dict.fromkeys(
            linear
            for choice in program.call_nodes(aten.topk.default)
            for linear in nearest_linears(choice)
        )
        refs = [linear_ref(program, node) for node in nodes]
        routers = tuple(ref for ref in refs if ref is not None)
        program.sites = replace(program.sites, routers=routers)
        return PassResult(0)
