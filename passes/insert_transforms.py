"""Insert the transforms that are merged into weights: T_r, T_v, T_k, T_u, and T_d's transpose.

Each pass turns sites into a map and its ports; `graph.edges` does the rest. Where no map is
allowed at a site the reason stands in the site's record and nothing is inserted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fptq_compiler.graph.edges import insert_map, insert_online, is_online
from fptq_compiler.graph.inputs import input_node
from fptq_compiler.graph.pipeline import Pass, PassResult
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.sites import LinearRef
from fptq_compiler.transforms import (
    Affine,
    Diagonal,
    Hadamard,
    Map,
    Port,
    RopePairs,
    Rotation,
    Side,
)
from fptq_compiler.transforms.hadamard import random_signs


def out_ports(
    ref: LinearRef, *, inverse_transpose: bool = False, repeat: int = 1
) -> list[Port]:
    """The ports on the output side of a projection: its weight, and its bias if it has one."""
    names = [ref.weight] if ref.bias is None else [ref.weight, ref.bias]
    return [
        Port(name, Side.OUT, inverse_transpose, repeat, ref.start, ref.stop) for name in names
    ]


def random_hadamard(size: int, blocks: int, generator: torch.Generator) -> Tensor:
    """A random-sign Hadamard matrix of order size / blocks, dense, float64."""
    block = size // blocks
    return Hadamard(block, random_signs(block, generator)).matrix().double()


class InsertResidual(Pass):
    """T_r: one rotation of the residual stream, from a random-sign Hadamard."""

    requires = ("norms_folded", "untied")
    provides = ("residual_inserted",)

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def run(self, program: Program) -> PassResult:
        """One map for the whole model."""
        site = program.sites.residual
        if site is None or "residual" in site.refused or "residual" in program.maps:
            return PassResult(0)
        generator = torch.Generator().manual_seed(self.seed)
        base = random_hadamard(site.width, 1, generator)
        ports = [Port(table, Side.TABLE, False) for table in site.tables]
        for writer in site.writers:
            ports += out_ports(writer)
        ports += [Port(reader.weight, Side.IN, False) for reader in site.readers]
        ports = list(dict.fromkeys(ports))
        insert_map(program, "residual", Rotation(site.width, base=base), ports)
        return PassResult(len(ports))


def value_transform(kind: str, heads: int, head_dim: int, generator: torch.Generator) -> Map:
    """A map of each head from a random-sign Hadamard: "affine", "rotation", or it: "hadamard"."""
    if kind == "hadamard":
        size = heads * head_dim
        return Hadamard(size, random_signs(size, generator), blocks=heads)
    base = random_hadamard(head_dim, 1, generator)
    if kind == "rotation":
        return Rotation(heads * head_dim, heads, base)
    return Affine(heads, head_dim, base=base)


class InsertValue(Pass):
    """T_v: an invertible map of each KV head's values, undone in the output projection."""

    requires = ("sites_found",)
    provides = ("value_inserted",)

    def __init__(self, seed: int, kind: str = "affine") -> None:
        """Take the seed of the signs, and what the map may become, see `value_transform`."""
        self.seed = seed
        self.kind = kind

    def run(self, program: Program) -> PassResult:
        """One map per attention."""
        generator = torch.Generator().manual_seed(self.seed)
        changed = 0
        for site in program.sites.attention:
            name = f"value.{site.name}"
            if "value" in site.refused or site.v is None or site.o is None:
                continue
            if name in program.maps:
                continue
            transform = value_transform(self.kind, site.kv_heads, site.head_dim, generator)
            into = Port(site.o.weight, Side.IN, False, site.group)
            insert_map(program, name, transform, [*out_ports(site.v), into])
            changed += 1
        return PassResult(changed)


class InsertPrerope(Pass):
    """T_k: a rotation and a scale of each RoPE pair, the reciprocal scale on the queries."""

    requires = ("sites_found",)
    provides = ("prerope_inserted",)

    def run(self, program: Program) -> PassResult:
        """One map per attention."""
        changed = 0
        for site in program.sites.attention:
            name = f"prerope.{site.name}"
            if "prerope" in site.refused or not site.rope or not site.q or not site.k:
                continue
            if name in program.maps:
                continue
            transform = RopePairs(
                torch.tensor(site.rope.pairs, dtype=torch.long).reshape(-1, 2),
                torch.tensor(site.rope.passthrough, dtype=torch.long),
                site.kv_heads,
                site.head_dim,
            )
            queries = out_ports(site.q, inverse_transpose=True, repeat=site.group)
            insert_map(program, name, transform, [*out_ports(site.k), *queries])
            changed += 1
        return PassResult(changed)


class InsertUpdown(Pass):
    """T_u: a positive scale of each channel between up and down projection."""

    requires = ("sites_found",)
    provides = ("updown_inserted",)

    def run(self, program: Program) -> PassResult:
        """One map per MLP."""
        changed = 0
        for site in program.sites.mlp:
            name = f"updown.{site.name}"
            if "updown" in site.refused or site.up is None or name in program.maps:
                continue
            into = Port(site.down.weight, Side.IN, False)
            insert_map(program, name, Diagonal(site.width), [*out_ports(site.up), into])
            changed += 1
        return PassResult(changed)


class InsertHadamard(Pass):
    """T_d: a Hadamard of the down projection's input at run time, transposed in its weight."""

    requires = ("sites_found",)
    provides = ("hadamard_inserted",)

    def __init__(self, block: int = 0) -> None:
        """Take how many neighbours are mixed with each other.

        Args:
            block: channels; 0 mixes all, as does a block that does not divide the width.
        """
        self.block = block

    def run(self, program: Program) -> PassResult:
        """One map per MLP."""
        changed = 0
        for site in program.sites.mlp:
            name = f"hadamard.{site.name}"
            down = program.node(site.down.node)
            source = input_node(down)
            if "hadamard" in site.refused or is_online(program, source):
                continue
            if name not in program.maps:
                into = Port(site.down.weight, Side.IN, False)
                insert_map(program, name, self._map(site.width), [into])
            # Layers that share their weights share the map, and each computes it online.
            insert_online(program, name, program.maps[name], down)
            changed += 1
        return PassResult(changed)

    def _map(self, width: int) -> Hadamard:
        divides = self.block > 0 and width % self.block == 0
        return Hadamard(width, blocks=width // self.block if divides else 1)
