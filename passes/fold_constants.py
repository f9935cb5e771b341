"""Evaluate what depends on parameters alone, once: `1 + gain`, transposed or cast weights.

A folded expression becomes a parameter named after the first one it reads. Expressions that
would grow (an expanded table) stay as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from fptq_compiler.graph.evaluate import run_node
from fptq_compiler.graph.pipeline import Pass, PassResult
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.surgery import get_parameter, replace, set_parameter


class FoldConstants(Pass):
    """Replace every maximal parameter-only expression by a parameter."""

    requires = ("canonical",)
    rounds = True

    def run(self, program: Program) -> PassResult:
        """Walk the graph once; constant nodes whose readers are not constant are replaced."""
        constant: dict[Node, int] = {}
        for node in program.graph.nodes:
            if node.op == "get_attr":
                value = program.held(str(node.target))
                constant[node] = value.numel()
            elif _foldable(node) and all(x in constant for x in node.all_input_nodes):
                constant[node] = sum(constant[x] for x in node.all_input_nodes)
        changed = 0
        names = {str(n.target) for n in program.graph.nodes if n.op == "get_attr"}
        for node, size in list(constant.items()):
            if node.op == "get_attr" or all(reader in constant for reader in node.users):
                continue
            with torch.no_grad():
                found = _evaluate(program, node)
            if not isinstance(found, Tensor) or found.numel() > size:
                continue
            name = _fresh(_first_parameter(node), names)
            names.add(name)
            set_parameter(program.module, name, found.contiguous())
            replace(node, get_parameter(program.graph, node, name, found))
            changed += 1
        return PassResult(changed)


def _foldable(node: Node) -> bool:
    return (
        node.op == "call_function"
        and bool(node.all_input_nodes)
        and isinstance(node.meta.get("val"), Tensor)
        and isinstance(node.target, torch._ops.OpOverload)
        and node.target.namespace == "aten"
    )


def _evaluate(program: Program, node: Node) -> object:
    environment: dict[Node, object] = {}
    stack = [node]
    while stack:
        top = stack[-1]
        waiting = [x for x in top.all_input_nodes if x.op != "get_attr" and x not in environment]
        if waiting:
            stack.extend(waiting)
        else:
            environment[top] = run_node(program.module, top, environment, None)
            stack.pop()
    return environment[node]


def _first_parameter(node: Node) -> str:
    while node.op != "get_attr":
        node = node.all_input_nodes[0]
    return str(node.target)


def _fresh(base: str, taken: set[str]) -> str:
    name, count = f"{base}_folded", 1
    while name in taken:
        count += 1
        name = f"{base}_folded{count}"
    return name
