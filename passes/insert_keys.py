"""Insert QuaRot's Hadamard of queries and keys behind RoPE: both online, and no weight changes.

    before  scores = q kᵀ
    after   scores = (q H) (k H)ᵀ     for every head, q k (B, H, S, d_h)

The keys that are quantised, and stored in a cache, are k H.
"""

from __future__ import annotations

from fptq_compiler.graph.edges import insert_online
from fptq_compiler.graph.inputs import input_node
from fptq_compiler.graph.pipeline import Pass, PassResult
from fptq_compiler.graph.program import Program
from fptq_compiler.passes.linear_inputs import is_inserted
from fptq_compiler.transforms import Hadamard

OPERANDS = ("query", "key")


class InsertKeys(Pass):
    """One map per attention, at two places."""

    requires = ("attention_found",)
    provides = ("keys_inserted",)

    def run(self, program: Program) -> PassResult:
        """Insert in front of every attention that allows it."""
        changed = 0
        for site in program.sites.attention:
            core, name = program.node(site.core), f"keys.{site.name}"
            if "keys" in site.refused or is_inserted(program, "keys", input_node(core, 1)):
                continue
            transform = program.maps.setdefault(name, Hadamard(site.head_dim))
            for position, operand in enumerate(OPERANDS):
                insert_online(program, f"{name}.{operand}", transform, core, position=position)
            changed += 1
        return PassResult(changed)
