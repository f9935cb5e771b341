"""Insert FlatQuant's online Kronecker products in front of the linears of every site.

    before  y = x W
    after   y = (x (P1 ⊗ P2)) ((P1 ⊗ P2)⁻¹ W)                            (arXiv 2410.09426)

P1 and P2 are any invertible matrices of nearly the same order, from random-sign Hadamards. In
front of o_proj P1 mixes the heads and P2 the channels of each; where T_v is, which does that
without being computed online, there is no P2.
"""

from __future__ import annotations

from math import isqrt

import torch
from torch.fx import Node

from fptq_compiler.graph.inputs import input_node
from fptq_compiler.graph.pipeline import Pass, PassResult
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.sites import AttentionSite
from fptq_compiler.passes.insert_transforms import random_hadamard
from fptq_compiler.passes.linear_inputs import (
    Site,
    entering,
    insert_before,
    is_inserted,
    refuse,
    sites,
)
from fptq_compiler.transforms import Affine, Identity, Kronecker, Map

LARGEST = 512
"""Order of a factor: it is computed densely."""


class InsertKronecker(Pass):
    """One map for what the first linears of a site read, one for what its last reads."""

    requires = ("sites_found",)
    provides = ("kronecker_inserted",)

    def __init__(self, seed: int) -> None:
        """Take the seed of the Hadamards' signs."""
        self.seed = seed

    def run(self, program: Program) -> PassResult:
        """Insert where the widths have two factors."""
        generator = torch.Generator().manual_seed(self.seed)
        changed, misses = 0, []
        for site in sites(program):
            if "kronecker" in site.refused:
                continue
            places = _places(program, site)
            orders = {kind: _orders(site, kind, x) for kind, x in places}
            wide = next((x for kind, x in places if orders[kind] is None), None)
            if wide is not None:
                reason = (
                    f"{_width(wide)} channels are no product of two orders from 2 to {LARGEST}"
                )
                misses.append(refuse(program, site, "kronecker", reason, wide))
                continue
            for kind, source in places:
                if not is_inserted(program, kind, source):
                    first, second = orders[kind] or (1, 1)
                    merged = _is_merged(program, site, kind)
                    transform = Kronecker(
                        _factor(first, generator),
                        Identity(second) if merged else _factor(second, generator),
                    )
                    insert_before(program, f"{kind}.{site.name}", transform, source)
                    changed += 1
        return PassResult(changed, tuple(misses))


def _places(program: Program, site: Site) -> list[tuple[str, Node]]:
    """The values to map at a site, each with the kind of its map."""
    last = site.o if isinstance(site, AttentionSite) else site.down
    places = [("kronecker", source) for source in entering(program, site)[:1]]
    if last is not None:
        places.append(("kronecker_output", input_node(program.node(last.node))))
    return places


def _width(source: Node) -> int:
    return int(source.meta["val"].shape[-1])


def _orders(site: Site, kind: str, source: Node) -> tuple[int, int] | None:
    """The orders of P1 and P2; None where there are none."""
    width = _width(source)
    if kind == "kronecker_output" and isinstance(site, AttentionSite) and site.heads > 1:
        return site.heads, width // site.heads
    first = next(n for n in range(isqrt(width), 0, -1) if width % n == 0)
    return None if first == 1 or width // first > LARGEST else (first, width // first)


def _is_merged(program: Program, site: Site, kind: str) -> bool:
    """Whether T_v maps the channels of every head already."""
    return kind == "kronecker_output" and f"value.{site.name}" in program.maps


def _factor(order: int, generator: torch.Generator) -> Map:
    return Affine(1, order, base=random_hadamard(order, 1, generator))
