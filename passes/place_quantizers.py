"""Put quantisers where the settings W-A-KV ask for them; their ranges come later.

Weights: every linear layer per output channel or block, the head with its own bits, the embedding
per row. Activations: the input of every linear (one quantiser where several read the same tensor),
the head's with 8 bits at least. Linears that choose experts stay in float. KV: the keys after RoPE
and the values, in front of attention, on a symmetric grid where they are stored in a cache; there
a scale may be that of one channel of one head. A target may demand symmetric grids throughout.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from fptq_compiler.errors import UnsupportedModelError
from fptq_compiler.graph import ops
from fptq_compiler.graph.edges import weight_end
from fptq_compiler.graph.inputs import input_node
from fptq_compiler.graph.pipeline import Effect, Pass, PassResult
from fptq_compiler.graph.program import ActivationQuantizer, Program, WeightQuantizer
from fptq_compiler.graph.surgery import add_module, call_module
from fptq_compiler.passes.linears import head_linears
from fptq_compiler.quant.modules import ActivationFakeQuantizer, WeightFakeQuantizer

aten = torch.ops.aten
FLOAT_BITS = 16


class PlaceQuantizers(Pass):
    """Insert fake quantisers; bits of 16 mean none."""

    requires = ("sites_found",)
    provides = ("quantizers_placed",)
    effect = Effect.APPROXIMATES

    def __init__(self, *, weights: int, activations: int, cache: int, block: int,
                 embedding_bits: int, head_bits: int, stored_cache: bool = False,
                 channel_scales: bool = False, symmetric: bool = False) -> None:
        self.weights = weights
        self.activations = activations
        self.cache = cache
        self.block = block
        self.embedding_bits = embedding_bits
        self.head_bits = head_bits
        self.stored_cache = stored_cache
        self.channel_scales = channel_scales
        self.symmetric = symmetric

    def run(self, program: Program) -> PassResult:
        """Weights first, then linear inputs, then keys and values."""
        if "quantizers_placed" in program.facts:
            return PassResult(0)
        heads = head_linears(program)
        routers = {router.node for router in program.sites.routers}
        linears = [n for n in program.call_nodes(aten.linear.default) if n.name not in routers]
        if routers:
            program.decisions.append(f"{len(routers)} routers of experts stay in float")
        for node in linears:
            is_head = node in heads
            bits = self.head_bits if is_head else self.weights
            if self.weights != FLOAT_BITS and bits != FLOAT_BITS:
                block = 0 if is_head else self.block
                _place_weight(program, node, 1, bits, block, "head" if is_head else "linear")
        if self.weights != FLOAT_BITS and self.embedding_bits != FLOAT_BITS:
            for node in program.call_nodes(aten.embedding.default):
                _refuse_odd_rows(node, self.embedding_bits)
                _place_weight(program, node, 0, self.embedding_bits, 0, "embedding")
        if self.activations != FLOAT_BITS:
            self._place_inputs(program, linears, heads)
        if self.cache != FLOAT_BITS:
            for core in program.call_nodes(ops.attention):
                for position, role in ((1, "key"), (2, "value")):
                    source = input_node(core, position)
                    _place_activation(
                        program, source, [core], self.cache, role,
                        symmetric=self.symmetric or self.stored_cache, stored=self.stored_cache,
                        scale_shape=_channels(source) if self.channel_scales else (),
                    )
        return PassResult(len(program.weight_quantizers) + len(program.activation_quantizers))

    def _place_inputs(self, program: Program, linears: list[Node], heads: set[Node]) -> None:
        sources: dict[Node, list[Node]] = {}
        for node in linears:
            source = input_node(node)
            sources.setdefault(source, []).append(node)
        for source, readers in sources.items():
            is_head = any(r in heads for r in readers)
            bits = max(self.activations, 8) if is_head else self.activations
            role = "head input" if is_head else "linear input"
            _place_activation(program, source, readers, bits, role, symmetric=self.symmetric)


def _refuse_odd_rows(table: Node, bits: int) -> None:
    width = int(table.meta["val"].shape[-1])
    if bits == 4 and width % 2:
        message = (
            f"{table.name}: INT4 codes of an embedding stand two to a byte, and its rows have "
            f"{width} values, an odd number; use --embedding-bits 8"
        )
        raise UnsupportedModelError(message)


def _place_weight(program: Program, reader: Node, position: int, bits: int, block: int,
                  role: str) -> None:
    argument = input_node(reader, position)
    end = weight_end(program, argument)
    if end is None:
        return
    name, shape = str(end.target), program.held(str(end.target)).shape
    if any(q.parameter == name for q in program.weight_quantizers):
        return
    path = f"weight_quantizers.{name.replace('.', '_')}"
    add_module(program.module, path, WeightFakeQuantizer(bits, shape, block))
    edge = call_module(program.graph, reader, path, (argument,), like=argument)
    for user in list(argument.users):
        if user is not edge:
            user.replace_input_with(argument, edge)
            if user < edge:
                user.prepend(edge)
    program.weight_quantizers.append(WeightQuantizer(name, path, bits, block, role))


def _channels(source: Node) -> tuple[int, ...]:
    """The shape of one scale for each head and channel of (B, H, S, D)."""
    _, heads, _, width = source.meta["val"].shape
    return 1, heads, 1, width


def _place_activation(program: Program, source: Node, readers: list[Node], bits: int,
                      role: str, *, symmetric: bool = False, stored: bool = False,
                      scale_shape: tuple[int, ...] = ()) -> None:
    path = f"activation_quantizers.{source.name}"
    if role in ("key", "value"):
        path = f"{path}_{role}"
    quantizer = ActivationFakeQuantizer(bits, symmetric=symmetric, scale_shape=scale_shape)
    add_module(program.module, path, quantizer)
    first = min(readers)
    edge = call_module(program.graph, first, path, (source,), like=source)
    for reader in readers:
        reader.replace_input_with(source, edge)
    program.activation_quantizers.append(
        ActivationQuantizer(path, edge.name, tuple(r.name for r in readers), role, bits, stored)
    )
