"""Turn the LayerNorms of the residual stream into RMSNorms: take the mean out where it is written.

    before  z = Σ y_i,  y_i = x_i W_i + b_i        LN(z) = g (z - mean z) / sd z + β
    after   z' = z - mean z = Σ y_i C,  C = I - 11ᵀ/d        RMS(z') = g z' / rms z'

LayerNorm does not see the mean of a token, and nothing else reads it, so every table and linear
that writes the stream writes without it (arXiv 2401.15024, section 3.1). The norm's bias β goes
into the linears that read it, b' = b + W β. What is left is the norm that T_r and S_n hold for.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.fx import Node

from fptq_compiler.graph import ops
from fptq_compiler.graph.commutes import Commutes
from fptq_compiler.graph.edges import CenterEdge, ShiftEdge, insert_edge
from fptq_compiler.graph.inputs import input_node
from fptq_compiler.graph.pipeline import Pass, PassResult
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.stream import LAYER_NORM, readers_behind
from fptq_compiler.graph.surgery import call, get_parameter, has_attribute, set_parameter
from fptq_compiler.graph.surgery import replace as replace_node
from fptq_compiler.transforms import Side

aten = torch.ops.aten


class CenterNorms(Pass):
    """Rewrite all norms of the stream, or none."""

    requires = ("sites_found", "untied")
    provides = ("norms_centered",)

    def run(self, program: Program) -> PassResult:
        """Take the mean out of every writer, then the bias out of every norm."""
        site = program.sites.residual
        if site is None or {"residual", "scaling"} <= set(site.refused):
            return PassResult(0)
        norms = [n for n in map(program.node, site.norms) if n.target is LAYER_NORM]
        if not norms:
            return PassResult(0)
        for parameter in site.tables:
            _center(program, parameter, Side.TABLE)
        for writer in site.writers:
            _center(program, writer.weight, Side.OUT)
            if writer.bias is not None:
                _center(program, writer.bias, Side.OUT)
        names = {n.name: _rewrite(program, n).name for n in norms}
        site = program.sites.residual
        assert site is not None
        branches = tuple(
            replace(b, norms=tuple(names[n] for n in b.norms)) for b in site.branches
        )
        found = replace(site, norms=tuple(names[n] for n in site.norms), branches=branches)
        program.sites = replace(program.sites, residual=found)
        return PassResult(len(norms))


def _center(program: Program, parameter: str, side: Side) -> None:
    path = f"edges.center.{parameter.replace('.', '_')}"
    insert_edge(program, path, parameter, CenterEdge(side))


def _rewrite(program: Program, norm: Node) -> Node:
    """An RMSNorm in place of a LayerNorm on a centred stream; its bias moves to the readers."""
    x, _, gain, bias, epsilon = (*norm.args, None, None, 1e-5)[:5]
    if isinstance(bias, Node):
        for reader in readers_behind(Commutes(program.module), norm):
            _shift(program, reader, program.parameter(str(bias.target)), norm.name)
    rms = call(program.graph, norm, ops.rms_norm, (x, gain, epsilon), like=norm)
    replace_node(norm, rms)
    return rms


@torch.no_grad()
def _shift(program: Program, linear: Node, beta: torch.Tensor, norm: str) -> None:
    """Give a linear the bias b + W β; where it has none, b is zero."""
    weight = input_node(linear, 1)
    W = program.parameter(str(weight.target))
    bias = linear.args[2] if len(linear.args) > 2 else None
    if not isinstance(bias, Node):
        name = _bias_name(program, str(weight.target))
        zero = torch.zeros(W.shape[0], dtype=W.dtype, device=W.device)
        set_parameter(program.module, name, zero)
        bias = get_parameter(program.graph, linear, name, zero)
        linear.args = (*linear.args[:2], bias)
        program.sites = program.sites.with_linears(
            lambda r: replace(r, bias=name) if r.node == linear.name else r
        )
    shift = torch.mv(W.double(), beta.double())
    path = f"edges.shift_{norm}.{linear.name}"
    insert_edge(program, path, str(bias.target), ShiftEdge(shift))


def _bias_name(program: Program, weight: str) -> str:
    """A free name beside the weight's."""
    folder, _, last = weight.rpartition(".")
    names = (f"{folder}.{stem}" for stem in ("bias", f"{last}_bias"))
    return next(n for n in names if not has_attribute(program.module, n))
