"""An ExportedProgram becomes a Program: parameters back on the module, plain inputs."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.fx.graph import CodeGen

from fptq_compiler.errors import UnsupportedModelError
from fptq_compiler.graph.program import InputSpec, Program
from fptq_compiler.graph.surgery import clean


def unlift(exported: ExportedProgram) -> Program:
    """Make the record that the passes work on.

    In-place operators are functionalised first, where there are any; the exported program
    itself is not changed, and shares its parameters with the result.

    Raises:
        UnsupportedModelError: the graph has no tensor input or no floating output.
    """
    if _has_mutation(exported):
        exported = exported.run_decompositions({})
    module = exported.module(check_guards=False)
    graph = module.graph
    for node in list(graph.nodes):
        if node.op == "call_module" and "_guards" in str(node.target):
            graph.erase_node(node)
    graph.set_codegen(CodeGen())
    for name, part in module.named_children():
        if isinstance(part, GraphModule):  # what a wrapper operator calls, shared until here
            setattr(module, name, copy.deepcopy(part))
    inputs = []
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            message = (
                f"input {node.name} is {type(value).__name__}, expected a tensor; export the "
                "model with tensor inputs only"
            )
            raise UnsupportedModelError(message)
        dims = tuple(int(d) if isinstance(d, int) else str(d) for d in value.shape)
        inputs.append(InputSpec(node.name, value.dtype, dims))
    if not inputs:
        message = "the exported graph has no input; expected token ids (B, S)"
        raise UnsupportedModelError(message)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    clean(module)
    return Program(module, tuple(inputs))


def _has_mutation(exported: ExportedProgram) -> bool:
    for node in exported.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        operator = isinstance(node.target, torch._ops.OpOverload)
        if schema is not None and operator and schema.is_mutable:
            return True
    return False
