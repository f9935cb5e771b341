"""Compute query, key and value of a cached attention by one linear.

    before  q = x Wq + bq,  k = x Wk + bk,  v = x Wv + bv
    after   qkv = x [Wq Wk Wv] + [bq bk bv]

Codes and scales are per output channel, so they only come to stand side by side; one kernel
starts where three did, and GroupQueryAttention takes its inputs packed.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from fptq_compiler.graph import cache_ops, ops
from fptq_compiler.graph.inputs import input_node
from fptq_compiler.graph.pipeline import Pass, PassResult
from fptq_compiler.graph.program import Program, WeightQuantizer
from fptq_compiler.graph.surgery import call, get_parameter, set_parameter


class PackProjections(Pass):
    """Pack where the three are quantised linears on one input, with scales per channel."""

    requires = ("cached", "frozen")
    provides = ("packed",)

    def run(self, program: Program) -> PassResult:
        """Pack every attention that allows it."""
        changed = 0
        for core in program.call_nodes(cache_ops.cached_attention):
            parts = [n for n in core.args[:3] if isinstance(n, Node)]
            if len(parts) == 3 and _alike(parts):
                _pack(program, core, parts)
                changed += 1
        return PassResult(changed)


def _alike(parts: list[Node]) -> bool:
    """Linears with one reader, one input, one width of codes and no blocks."""
    if any(p.target is not ops.linear or len(p.users) != 1 for p in parts):
        return False
    settings = {(p.args[0], p.args[4], p.args[5]) for p in parts}
    return len(settings) == 1 and not parts[0].args[5]


@torch.no_grad()
def _pack(program: Program, core: Node, parts: list[Node]) -> None:
    names = [_name(p, 1) for p in parts]
    prefix = names[0].removesuffix("_codes")
    codes = torch.cat([program.parameter(n) for n in names], 1)
    scale = torch.cat([program.parameter(_name(p, 2)) for p in parts])
    biases = [
        program.parameter(_name(p, 3)) if p.args[3] is not None
        else scale.new_zeros(program.parameter(name).shape[1])
        for p, name in zip(parts, names, strict=True)
    ]
    has_bias = any(p.args[3] is not None for p in parts)
    parameter = f"{prefix}_qkv"
    values = {f"{parameter}_codes": codes, f"{parameter}_scale": scale}
    if has_bias:
        values[f"{parameter}_bias"] = torch.cat(biases)
    first = max(parts)
    stored: list[Node | None] = []
    for name, value in values.items():
        set_parameter(program.module, name, value, made_of=names[0])
        stored.append(get_parameter(program.graph, first, name, value))
    if not has_bias:
        stored.append(None)
    arguments = (parts[0].args[0], *stored, *parts[0].args[4:])
    packed = call(program.graph, first, ops.linear, arguments, like=None, name=f"{first.name}_qkv")
    core.args = (packed, None, None, *core.args[3:])
    _replace_records(program, [n.removesuffix("_codes") for n in names], parameter)


def _name(linear: Node, argument: int) -> str:
    node = input_node(linear, argument)
    return str(node.target)


def _replace_records(program: Program, old: list[str], new: str) -> None:
    """One record of a quantised weight for three."""
    records = program.weight_quantizers
    first = next(r for r in records if r.parameter == old[0])
    merged = WeightQuantizer(new, first.module, first.bits, first.block, first.role)
    program.weight_quantizers = [
        merged if r is first else r for r in records if r is first or r.parameter not in old
    ]
