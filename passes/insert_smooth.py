"""Insert SmoothQuant's scale of each channel between a norm and the linears that read it.

    before  y = ν(x) W
    after   y = (ν(x) diag(1/s)) (diag(s) W)                              (arXiv 2211.10438)

The activation's side stands online until the fold, and then becomes the norm's gain, which costs
nothing; so it is inserted only where that can be.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from fptq_compiler.graph import ops
from fptq_compiler.graph.pipeline import Pass, PassResult
from fptq_compiler.graph.program import Program
from fptq_compiler.passes.linear_inputs import (
    entering,
    insert_before,
    is_inserted,
    readers,
    refuse,
    sites,
)
from fptq_compiler.transforms import Diagonal

aten = torch.ops.aten


class InsertSmooth(Pass):
    """One map for each norm in front of an attention or an MLP."""

    requires = ("norms_folded",)
    provides = ("smooth_inserted",)

    def run(self, program: Program) -> PassResult:
        """Insert where nothing but linears reads the norm."""
        changed, misses = 0, []
        for site in sites(program):
            sources = entering(program, site)
            if "smooth" in site.refused or all(is_inserted(program, "smooth", s) for s in sources):
                continue
            reason = _refusal(sources)
            if reason:
                misses.append(refuse(program, site, "smooth", reason, sources[0]))
                continue
            (norm,) = sources
            transform = Diagonal(int(norm.meta["val"].shape[-1]))
            insert_before(program, f"smooth.{site.name}", transform, norm)
            changed += 1
        return PassResult(changed, tuple(misses))


def _refusal(sources: list[Node]) -> str:
    """Why no scale stands between a norm and the linears; empty where one may."""
    if len(sources) > 1:
        return f"its projections read {sources[0].name} and {sources[1].name}, expected one norm"
    (source,) = sources
    if source.target is not ops.rms_norm:
        return f"its projections read {source.name}, which is no norm with a gain"
    linears = readers(source)
    others = [
        n for n in source.users if n not in linears and n.target is not aten.sym_size.int
    ]
    return f"{others[0].name} reads the norm too and is no linear layer" if others else ""
