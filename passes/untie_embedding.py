"""Give the head a weight of its own where it shares the embedding's.

T_r turns the table and the head's input alike, but the last norm's gain goes into the head
alone, and the two are quantised along different axes, so they cannot stay one parameter. What
this costs in bytes is a decision in the report.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.fx import Node

from fptq_compiler.graph.pipeline import Pass, PassResult
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.surgery import get_parameter, set_parameter
from fptq_compiler.passes.linears import weight_node

aten = torch.ops.aten


class UntieEmbedding(Pass):
    """Copy a parameter that an embedding and a linear share; the linear gets the copy."""

    requires = ("sites_found",)
    provides = ("untied",)

    def run(self, program: Program) -> PassResult:
        """Untie each shared table; an untied model is left as it is."""
        changed = 0
        tables = {
            program.parameter(str(weight_node(n).target)).data_ptr(): n
            for n in program.call_nodes(aten.embedding.default)
            if weight_node(n).op == "get_attr"
        }
        for linear in program.call_nodes(aten.linear.default):
            weight = weight_node(linear)
            if weight.op != "get_attr":
                continue
            embedding = tables.get(program.parameter(str(weight.target)).data_ptr())
            if embedding is not None:
                _untie(program, embedding, linear)
                changed += 1
        return PassResult(changed)


def _untie(program: Program, embedding: Node, linear: Node) -> None:
    name = str(weight_node(embedding).target)
    table = program.parameter(name)
    copy_name = str(weight_node(linear).target)
    if copy_name == name:
        copy_name = f"{name}_untied"
    set_parameter(program.module, copy_name, table.detach().clone())
    copied = get_parameter(program.graph, linear, copy_name, table)
    linear.replace_input_with(weight_node(linear), copied)
    site = program.sites.residual
    if site is not None and site.head.node == linear.name:
        head = replace(site.head, weight=copy_name)
        readers = tuple(head if r.node == linear.name else r for r in site.readers)
        program.sites = replace(
            program.sites, residual=replace(site, tied=False, head=head, readers=readers)
        )
    megabytes = table.numel() * table.element_size() / 1e6
    program.decisions.append(
        f"untied the head {copy_name} from the embedding {name}: {megabytes:.1f} MB more in "
        f"{str(table.dtype).removeprefix('torch.')}, before quantisation"
    )
