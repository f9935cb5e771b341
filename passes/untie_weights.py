"""Give every linear a weight of its own: the head that shares the embedding's, and shared layers.

T_r turns the table and the head's input alike, but the last norm's gain goes into the head
alone, and the two are quantised along different axes, so they cannot stay one parameter. Linears
that share a weight (ALBERT, or tied projections) would each get the other's transforms. What the
copies cost in bytes is a decision in the report.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from itertools import count

import torch
from torch.fx import Node

from fptq_compiler.graph.pipeline import Pass, PassResult
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.sites import Sites
from fptq_compiler.graph.stored import copy_of, identity
from fptq_compiler.graph.surgery import get_parameter, has_attribute, set_parameter
from fptq_compiler.passes.linears import weight_node

aten = torch.ops.aten


class UntieWeights(Pass):
    """Copy each weight that an embedding or an earlier linear already reads."""

    requires = ("sites_found",)
    provides = ("untied",)

    def run(self, program: Program) -> PassResult:
        """Walk the readers in order, tables first; the first reader keeps the parameter."""
        readers = program.call_nodes(aten.embedding.default)
        readers += program.call_nodes(aten.linear.default)
        seen: dict[Hashable, str] = {}
        changed = 0
        for reader in readers:
            weight = weight_node(reader)
            if weight.op != "get_attr":
                continue
            name = str(weight.target)
            address = identity(program.held(name))
            if address in seen:
                _copy(program, reader, name, seen[address])
                changed += 1
            seen.setdefault(address, name)
        return PassResult(changed)


def _copy(program: Program, reader: Node, name: str, first: str) -> None:
    """Give `reader` a copy; it keeps its parameter's name where that is not the first's."""
    table = program.held(name)
    own = name
    if name == first:
        names = (_numbered(name, number) for number in count(1))
        own = next(n for n in names if not has_attribute(program.module, n))
    set_parameter(program.module, own, copy_of(table))
    copied = get_parameter(program.graph, reader, own, table)
    reader.replace_input_with(weight_node(reader), copied)
    program.sites = _renamed(program.sites, reader.name, own)
    megabytes = table.numel() * table.element_size() / 1e6
    program.decisions.append(
        f"untied: {reader.name} gets its own copy of {first}, named {own}, {megabytes:.1f} MB "
        f"more in {str(table.dtype).removeprefix('torch.')} before quantisation"
    )


def _numbered(name: str, number: int) -> str:
    return f"{name}_untied" if number == 1 else f"{name}_untied{number}"


def _renamed(sites: Sites, node: str, weight: str) -> Sites:
    """The sites with the new weight name wherever they refer to that linear."""
    found = sites.with_linears(lambda r: replace(r, weight=weight) if r.node == node else r)
    residual = found.residual
    if residual is not None and residual.head.node == node:
        return replace(found, residual=replace(residual, tied=False))
    return found
