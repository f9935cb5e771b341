"""Refuse what no pass can look into: control flow on values, and operators of other libraries."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from fptq_compiler.errors import UnsupportedModelError
from fptq_compiler.graph.program import Program, source_line

WRAPPERS = ("wrap_with_set_grad_enabled", "wrap_with_autocast")
"""Higher-order operators that run what they hold once, as it is."""

KNOWN = ("aten", "prim", "prims", "fptq")


def refuse_control_flow(module: GraphModule) -> None:
    """Walk the graph and those that wrappers hold.

    Raises:
        UnsupportedModelError: torch.cond, while_loop, map and the like.
    """
    for part in module.modules():
        for node in part.graph.nodes if isinstance(part, GraphModule) else ():
            higher = isinstance(node.target, torch._ops.HigherOrderOperator)
            if higher and str(node.target) not in WRAPPERS:
                message = (
                    f"node {node.name} ({node.target}) runs other graphs by what its inputs are, "
                    f"expected a graph without control flow on values. {source_line(node)}\n"
                    "Write it with torch.where, or unroll it, and export the model again."
                )
                raise UnsupportedModelError(message)


def custom_operators(program: Program) -> list[Node]:
    """The calls of other libraries' operators."""
    return [
        node for node in program.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace not in KNOWN
    ]


def refuse_custom_operators(program: Program) -> None:
    """Refuse what was not raised to torch's operators or ours.

    Raises:
        UnsupportedModelError: a custom operator.
    """
    for node in custom_operators(program):
        message = (
            f"node {node.name} ({node.target}) is a custom operator, expected torch's own: "
            f"nothing can look into it, and ONNX has no form of it. {source_line(node)}\n"
            "Export the model with that part written in plain torch."
        )
        raise UnsupportedModelError(message)
