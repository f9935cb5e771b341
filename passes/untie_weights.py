"""Give every linear a weight of its own: the head that shares the embedding's, and shared layers.

T_r turns the table and the head's input alike, but the last norm's gain goes into the head
alone, and the two are quantised along different axes, so they cannot stay one parameter. Linears
that share a weight or bias (ALBERT, or tied projections) would each get the other's transforms;
their sites, which are named after their weights, get names of their own too. What the copies cost
in bytes is a decision in the report.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from itertools import count

import torch
from torch.fx import Node

from fptq_compiler.graph.pipeline import Pass, PassResult
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.sites import LinearRef, Sites
from fptq_compiler.graph.stored import copy_of, identity
from fptq_compiler.graph.surgery import get_parameter, has_attribute, set_parameter
from fptq_compiler.passes.linears import weight_node

aten = torch.ops.aten


class UntieWeights(Pass):
    """Copy each weight and bias that an embedding or an earlier linear already reads."""

    requires = ("sites_found",)
    provides = ("untied",)

    def run(self, program: Program) -> PassResult:
        """Walk the readers in order, tables first; the first reader keeps the parameter."""
        readers = program.call_nodes(aten.embedding.default)
        readers += program.call_nodes(aten.linear.default)
        seen: dict[Hashable, str] = {}
        changed = 0
        for reader, parameter in [(r, p) for r in readers for p in _parameters(r)]:
            name = str(parameter.target)
            address = identity(program.held(name))
            if address in seen:
                _copy(program, reader, parameter, seen[address])
                changed += 1
            seen.setdefault(address, name)
        program.sites = _named_apart(program.sites)
        return PassResult(changed)


def _parameters(reader: Node) -> list[Node]:
    """The weight and bias of an embedding or linear, where they are parameters."""
    found = [weight_node(reader)]
    if reader.target is aten.linear.default and len(reader.args) > 2:
        found += [bias for bias in reader.args[2:3] if isinstance(bias, Node)]
    return [p for p in found if p.op == "get_attr"]


def _copy(program: Program, reader: Node, parameter: Node, first: str) -> None:
    """Give `reader` a copy; it keeps its parameter's name where that is not the first's."""
    name = str(parameter.target)
    table = program.held(name)
    own = name
    if name == first:
        names = (_numbered(name, number) for number in count(1))
        own = next(n for n in names if not has_attribute(program.module, n))
    set_parameter(program.module, own, copy_of(table))
    copied = get_parameter(program.graph, reader, own, table)
    reader.replace_input_with(parameter, copied)
    program.sites = _renamed(program.sites, reader.name, name, own)
    megabytes = table.numel() * table.element_size() / 1e6
    program.decisions.append(
        f"untied: {reader.name} gets its own copy of {first}, named {own}, {megabytes:.1f} MB "
        f"more in {str(table.dtype).removeprefix('torch.')} before quantisation"
    )


def _numbered(name: str, number: int) -> str:
    return f"{name}_untied" if number == 1 else f"{name}_untied{number}"


def _renamed(sites: Sites, node: str, name: str, own: str) -> Sites:
    """The sites with the new name of a parameter wherever they refer to that linear."""

    def renamed(ref: LinearRef) -> LinearRef:
        if ref.node != node:
            return ref
        weight = own if ref.weight == name else ref.weight
        return replace(ref, weight=weight, bias=own if ref.bias == name else ref.bias)

    found = sites.with_linears(renamed)
    old, new = sites.residual, found.residual
    if old is not None and new is not None and new.head.weight != old.head.weight:
        return replace(found, residual=replace(new, tied=False))
    return found


def _named_apart(sites: Sites) -> Sites:
    """The sites with a number behind each name that an earlier site has."""
    taken: dict[str, int] = {}

    def own(name: str) -> str:
        taken[name] = taken.get(name, 0) + 1
        return name if taken[name] == 1 else _numbered(name, taken[name] - 1)

    return replace(
        sites,
        attention=tuple(replace(s, name=own(s.name)) for s in sites.attention),
        mlp=tuple(replace(s, name=own(s.name)) for s in sites.mlp),
    )
