"""An ExportedProgram becomes a Program: parameters back on the module, plain inputs."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen

from fptq_compiler.errors import UnsupportedModelError
from fptq_compiler.graph.foreign import refuse_control_flow
from fptq_compiler.graph.program import InputSpec, Program
from fptq_compiler.graph.surgery import clean


def unlift(exported: ExportedProgram) -> Program:
    """Make the record that the passes work on.

    In-place operators are functionalised first, where there are any; the exported program
    itself is not changed, and shares its parameters with the result. Inputs that are no tensors
    and that nothing reads (`use_cache`, an argument that is None) are left out.

    Raises:
        UnsupportedModelError: the graph has no tensor input, or control flow on values.
    """
    if any(_mutates(n) for n in exported.graph.nodes):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's, as it copies its own trees
            exported = _with_own_constants(exported).run_decompositions({})
    module = exported.module(check_guards=False)
    graph = module.graph
    for node in list(graph.nodes):
        if node.op == "call_module" and "_guards" in str(node.target):
            graph.erase_node(node)
        elif node.target is _DETACH_IN_PLACE:
            node.target = torch.ops.aten.detach.default
    graph.set_codegen(CodeGen())
    for name, part in module.named_children():
        if isinstance(part, GraphModule):  # what a wrapper operator calls, shared until here
            setattr(module, name, copy.deepcopy(part))
    inputs = []
    for node in list(graph.nodes):
        if node.op != "placeholder":
            continue
        value = node.meta.get("val")
        if not isinstance(value, Tensor) and not node.users:
            graph.erase_node(node)
            continue
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
    refuse_control_flow(module)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    clean(module)
    return Program(module, tuple(inputs))


_DETACH_IN_PLACE = torch.ops.aten.detach_.default  # of literals; it changes no value


def _mutates(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    operator = isinstance(node.target, torch._ops.OpOverload)
    return (
        schema is not None and operator and schema.is_mutable
        and node.target is not _DETACH_IN_PLACE
    )


def _with_own_constants(exported: ExportedProgram) -> ExportedProgram:
    """Constants that are written to become buffers, each with memory of its own.

    That is how torch.export without `strict` captures a static cache that is also registered
    as buffers; its functionalisation takes two names for one tensor for an error.
    """
    written = {
        source.name
        for node in exported.graph.nodes if _mutates(node)
        for source in node.all_input_nodes if source.op == "placeholder"
    }
    if not written:
        return exported
    constants = dict(exported.constants)
    specs = []
    for spec in exported.graph_signature.input_specs:
        if spec.kind is InputKind.CONSTANT_TENSOR and spec.arg.name in written:
            assert spec.target is not None
            constants[spec.target] = exported.constants[spec.target].clone()
            specs.append(replace(spec, kind=InputKind.BUFFER, persistent=False))
        else:
            specs.append(spec)
    signature = replace(exported.graph_signature, input_specs=specs)
    return exported._update(exported.graph_module, signature, constants=constants)
