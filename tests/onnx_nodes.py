"""Read the nodes of a written file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx


def every_node(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and of the branches in it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from every_node(attribute.g)


def nodes(model: onnx.ModelProto, op_type: str) -> list[onnx.NodeProto]:
    """All nodes of that operator."""
    return [n for n in every_node(model.graph) if n.op_type == op_type]


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """The attributes of a node as Python values."""
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
