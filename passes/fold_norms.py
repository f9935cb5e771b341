"""Move every norm's gain into the linears that read it: W' = W diag(gain).

Afterwards each norm is scale-free, which T_r needs (a rotation commutes with x / rms(x) but not
with a gain) and S_n too. The product stands on the weight edge until the one fold.
"""

from __future__ import annotations

from dataclasses import replace as replace_record

from torch.fx import Node

from fptq_compiler.graph import ops
from fptq_compiler.graph.commutes import Commutes
from fptq_compiler.graph.edges import GainEdge, insert_edge
from fptq_compiler.graph.pipeline import Pass, PassResult
from fptq_compiler.graph.program import NearMiss, Program, source_line
from fptq_compiler.graph.stream import readers_behind, unfolded
from fptq_compiler.passes.linears import parameter_readers, weight_node


class FoldNorms(Pass):
    """Fold gains whose norm is read by linears alone, each with a weight of its own."""

    requires = ("sites_found",)
    provides = ("norms_folded",)

    def run(self, program: Program) -> PassResult:
        """Fold what can be folded; a norm of the stream that keeps its gain is a near miss."""
        changed, misses = 0, []
        commutes = Commutes(program.module)
        for norm in program.call_nodes(ops.rms_norm):
            gain = norm.args[1]
            if not isinstance(gain, Node):
                continue
            readers = readers_behind(commutes, norm)
            stranger = unfolded(commutes, norm)
            shared = (r for r in readers if parameter_readers(program, weight_node(r)) > 1)
            stranger = stranger or next(shared, None)
            if stranger is not None and _on_stream(program, norm):
                reason = f"the gain stays: {stranger.name} reads the norm and is no plain linear"
                misses.append(NearMiss("norm", norm.name, reason, source_line(stranger)))
                _refuse_transforms(program, reason)
            if stranger is not None:
                continue
            factor = program.parameter(str(gain.target))
            for reader in readers:
                name = str(weight_node(reader).target)
                path = f"edges.gain_{norm.name}.{reader.name}"
                insert_edge(program, path, name, GainEdge(factor))
            norm.args = (norm.args[0], None, norm.args[2])
            changed += 1
        return PassResult(changed, tuple(misses))


def _on_stream(program: Program, norm: Node) -> bool:
    site = program.sites.residual
    return site is not None and norm.name in site.norms


def _refuse_transforms(program: Program, reason: str) -> None:
    site = program.sites.residual
    assert site is not None
    refused = {**site.refused, "residual": reason, "scaling": reason}
    program.sites = replace_record(
        program.sites, residual=replace_record(site, refused=refused)
    )
