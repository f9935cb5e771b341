"""Give the head a weight of its own where it shares the embedding's.

T_r turns the table and the head's input alike, but the last norm's gain goes into the head
alone, so the two cannot stay one parameter. What this costs in bytes is a decision in the report.
"""

from __future__ import annotations

from dataclasses import replace

from fptq_compiler.graph.pipeline import Pass, PassResult
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.surgery import get_parameter, set_parameter
from fptq_compiler.passes.linears import weight_node


class UntieEmbedding(Pass):
    """Copy the shared parameter; the head's copy is named after the embedding's."""

    requires = ("sites_found",)
    provides = ("untied",)

    def run(self, program: Program) -> PassResult:
        """Untie once; an untied model is left as it is."""
        site = program.sites.residual
        if site is None or not site.tied:
            return PassResult(0)
        table = program.parameter(site.table)
        name = site.head.weight
        if name == site.table:
            name = "lm_head.weight"
            while name in dict(program.module.named_parameters(remove_duplicate=False)):
                name = f"untied_{name}"
        embedding = program.node(site.embedding)
        table_name = site.table if name != site.table else site.table
        set_parameter(program.module, name, table.detach().clone())
        set_parameter(program.module, table_name, table.detach())
        head = program.node(site.head.node)
        copied = get_parameter(program.graph, head, name, table)
        head.replace_input_with(weight_node(head), copied)
        own = get_parameter(program.graph, embedding, table_name, table)
        embedding.replace_input_with(weight_node(embedding), own)
        untied = replace(site.head, weight=name)
        readers = tuple(
            untied if r.node == site.head.node else r for r in site.readers
        )
        program.sites = replace(
            program.sites,
            residual=replace(site, tied=False, head=untied, readers=readers),
        )
        megabytes = table.numel() * table.element_size() / 1e6
        program.decisions.append(
            f"untied the head {name} from the embedding {site.table}: {megabytes:.1f} MB more "
            f"in {str(table.dtype).removeprefix('torch.')}, before quantisation"
        )
        return PassResult(1)
