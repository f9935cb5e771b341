"""The short text form of a graph that tests compare and `--dump-dir` writes.

One line a node: `name = operator(arguments)`. Parameters stand as `%their.name` at the place
of use, literals as Python writes them; shapes are left to the reader.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx
from torch.fx import Node


def dump(module: fx.GraphModule, nodes: Iterable[Node] | None = None) -> str:
    """The graph, or only the given nodes of it, as text."""
    chosen = module.graph.nodes if nodes is None else nodes
    lines = [_line(n) for n in chosen if n.op != "get_attr"]
    return "\n".join(lines) + "\n"


def _line(node: Node) -> str:
    if node.op == "placeholder":
        return f"{node.name} = input"
    arguments = [_word(x) for x in node.args]
    arguments += [f"{k}={_word(v)}" for k, v in node.kwargs.items()]
    if node.op == "output":
        return f"return {', '.join(arguments)}"
    return f"{node.name} = {_operator(node)}({', '.join(arguments)})"


def _operator(node: Node) -> str:
    if node.op == "call_module":
        return f"[{node.target}]"
    text = str(getattr(node.target, "__name__", node.target))
    if hasattr(node.target, "namespace"):
        text = str(node.target)
    return text.removesuffix(".default").removesuffix(".Tensor").removeprefix("aten.")


def _word(value: Any) -> str:
    if isinstance(value, Node):
        return f"%{value.target}" if value.op == "get_attr" else value.name
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_word(x) for x in value)}]"
    return repr(value)
