"""Replace fake quantisers by what ships: integer codes for weights, literals for activations.

A weight quantiser and its linear become `fptq.linear` on codes (K, N); an embedding becomes
`fptq.embedding` on codes (V, d), in INT4 two to a byte. The codes come from the function that
training used. Keys and values that a cache will hold become `fptq.stored`, what it gives back of
them.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from fptq_compiler.graph import cache_ops, ops
from fptq_compiler.graph.pipeline import Effect, Pass, PassResult
from fptq_compiler.graph.program import ActivationQuantizer, Program, WeightQuantizer
from fptq_compiler.graph.surgery import call, get_parameter, replace, set_parameter
from fptq_compiler.memory import return_freed_memory
from fptq_compiler.quant.grid import round_zero_point
from fptq_compiler.quant.modules import ActivationFakeQuantizer, WeightFakeQuantizer
from fptq_compiler.quant.pairs import pack_pairs

aten = torch.ops.aten


class FreezeQuantizers(Pass):
    """After this the program is the integer model, and `Program.run` is its reference."""

    requires = ("quantizers_placed", "calibrated", "folded")
    provides = ("frozen",)
    effect = Effect.APPROXIMATES

    @torch.no_grad()
    def run(self, program: Program) -> PassResult:
        """Freeze weights, then activations."""
        modules = {n.target: n for n in program.graph.nodes if n.op == "call_module"}
        changed = 0
        for quantizer in program.weight_quantizers:
            if quantizer.module in modules:
                _freeze_weight(program, quantizer, modules[quantizer.module])
                return_freed_memory()
                changed += 1
        for record in program.activation_quantizers:
            node = modules.get(record.module)
            if node is None:
                continue
            module = program.module.get_submodule(record.module)
            assert isinstance(module, ActivationFakeQuantizer)
            freeze = _freeze_stored if record.stored else _freeze_activation
            replace(node, freeze(program, record, module, node))
            changed += 1
        return PassResult(changed)


def _freeze_activation(
    program: Program, record: ActivationQuantizer, module: ActivationFakeQuantizer, node: Node
) -> Node:
    zero_point = round_zero_point(module.zero_point, module.grid)
    zero = int(zero_point.item()) - module.grid.lowest  # the operator's codes start at 0
    arguments = (node.args[0], module.scale.item(), zero, record.bits, record.role)
    return call(program.graph, node, ops.fake_quantize, arguments, like=node,
                name=f"{node.name}_frozen")


def _freeze_stored(
    program: Program, record: ActivationQuantizer, module: ActivationFakeQuantizer, node: Node
) -> Node:
    """The scale is a parameter that broadcasts to (B, H, S, D), per tensor (1, 1, 1, 1)."""
    scale = module.scale.detach()
    scale = scale if scale.dim() else scale.reshape(1, 1, 1, 1)
    name = f"{record.module}_scale"
    set_parameter(program.module, name, scale)
    stored = get_parameter(program.graph, node, name, scale)
    return call(program.graph, node, cache_ops.stored, (node.args[0], stored, record.bits),
                like=node, name=f"{node.name}_frozen")


def _freeze_weight(program: Program, quantizer: WeightQuantizer, edge: Node) -> None:
    module = program.module.get_submodule(quantizer.module)
    assert isinstance(module, WeightFakeQuantizer)
    weight = program.parameter(quantizer.parameter)
    codes, scale = module.codes(weight), module.scale.detach()
    embeds = quantizer.role == "embedding"
    codes_name, scale_name = f"{quantizer.parameter}_codes", f"{quantizer.parameter}_scale"
    if embeds:
        stored_codes = pack_pairs(codes) if quantizer.bits == 4 else codes
    else:
        stored_codes = codes.t().contiguous()
    set_parameter(program.module, codes_name, stored_codes, made_of=quantizer.parameter)
    set_parameter(program.module, scale_name, scale if embeds else scale.t().contiguous())
    for reader in list(edge.users):
        stored = get_parameter(program.graph, reader, codes_name, stored_codes)
        steps = get_parameter(program.graph, reader, scale_name, program.held(scale_name))
        if reader.target is aten.embedding.default:
            arguments: tuple[object, ...] = (reader.args[1], stored, steps, quantizer.bits)
            frozen = call(program.graph, reader, ops.embedding, arguments, like=reader)
        else:
            bias = reader.args[2] if len(reader.args) > 2 else None
            arguments = (reader.args[0], stored, steps, bias, quantizer.bits, quantizer.block)
            frozen = call(program.graph, reader, ops.linear, arguments, like=reader,
                          name=f"{reader.name}_frozen")
        replace(reader, frozen)
