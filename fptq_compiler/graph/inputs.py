"""What a node reads, where the operator's signature says that it is another node."""

from __future__ import annotations

from torch.fx import Node


def input_node(node: Node, place: int = 0) -> Node:
    """The node that stands at `place` of the arguments."""
    found = node.args[place]
    assert isinstance(found, Node), f"argument {place} of {node.name} is {found!r}"
    return found


def input_nodes(node: Node, count: int) -> list[Node]:
    """The nodes that stand at the first `count` places."""
    return [input_node(node, place) for place in range(count)]
