"""Insert QuaRot's Hadamard across heads: online in front of o_proj, its inverse in the weight.

    before  y = x W_o
    after   y = (x (H ⊗ 1)) ((H ⊗ 1)ᵀ W_o)     x (B, S, heads · d_h), H of order heads

With a Hadamard of every head in T_v it makes one of all channels (arXiv 2404.00456).
"""

from __future__ import annotations

from torch.fx import Node

from fptq_compiler.graph.inputs import input_node
from fptq_compiler.graph.pipeline import Pass, PassResult
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.sites import AttentionSite
from fptq_compiler.passes.linear_inputs import insert_before, is_inserted, refuse
from fptq_compiler.transforms import Hadamard, Identity, Kronecker


class InsertHeads(Pass):
    """One map per attention."""

    requires = ("sites_found",)
    provides = ("heads_inserted",)

    def run(self, program: Program) -> PassResult:
        """Insert where one linear reads the heads, and there are several."""
        changed, misses = 0, []
        for site in program.sites.attention:
            if "heads" in site.refused:
                continue
            reason = _refusal(site)
            if reason or site.o is None:
                core = program.node(site.core)
                misses.append(refuse(program, site, "heads", reason, core))
                continue
            source = input_node(program.node(site.o.node))
            if not is_inserted(program, "heads", source):
                insert_before(program, f"heads.{site.name}", _map(site, source), source)
                changed += 1
        return PassResult(changed, tuple(misses))


def _refusal(site: AttentionSite) -> str:
    if site.o is None:
        return site.refused.get("value", "no output projection was found")
    return "it has one head, and none to mix it with" if site.heads == 1 else ""


def _map(site: AttentionSite, source: Node) -> Kronecker:
    width = int(source.meta["val"].shape[-1])
    return Kronecker(Hadamard(site.heads), Identity(width // site.heads))
