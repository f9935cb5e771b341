"""Give every carried operator the form of the target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from fptq_compiler.lower.emitter import Emitter
from fptq_compiler.lower.targets.carried import DOMAIN
from fptq_compiler.lower.targets.types import FLOAT

Expansion = Callable[[Emitter, ir.Node], tuple[Any, ...]]


def expand(
    model: ir.Model, expansions: Mapping[str, Expansion], float_type: int = FLOAT
) -> int:
    """Replace all nodes of the domain `fptq`; gives how many there were. Done in place."""
    graph = model.graph
    carried = [n for n in graph if n.domain == DOMAIN]
    model.opset_imports.pop(DOMAIN, None)
    shared = Emitter("shared", float_type=float_type)
    for number, node in enumerate(carried):
        op = Emitter(f"{node.op_type.lower()}_{number}", shared, float_type)
        made_before = len(shared.nodes)
        results = expansions[node.op_type](op, node)
        ir.convenience.replace_nodes_and_values(
            graph, node, [node], [*shared.nodes[made_before:], *op.nodes],
            node.outputs, results,
        )
        for new, old in zip(results, node.outputs, strict=True):
            new.shape, new.type = old.shape, old.type
        for value in op.initializers:
            graph.register_initializer(value)
    for value in shared.initializers:
        graph.register_initializer(value)
    for domain in {n.domain for n in graph.all_nodes()} - {""}:
        model.opset_imports.setdefault(domain, 1)
    RemoveUnusedNodesPass()(model)
    return len(carried)
