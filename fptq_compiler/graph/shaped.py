"""Calls whose recorded value is computed, for rewrites whose results look like no other node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fptq_compiler.graph.surgery import call


def shaped_call(
    graph: fx.Graph, before: Node, target: Callable[..., Any], args: Sequence[Any], *, like: Node
) -> Node:
    """Insert a call in front of `before`, made where `like` was, and record its value.

    It is computed on fake tensors, those of the graph's inputs where it reads none itself: on a
    real one a symbol would become the number that it had in the export.
    """
    node = call(graph, before, target, args, like=like)
    inputs = (n for n in graph.nodes if n.op == "placeholder")
    given = (x.meta["val"] for x in (*node.all_input_nodes, *inputs))
    mode = next((x.fake_mode for x in given if isinstance(x, FakeTensor)), None)
    with mode or nullcontext():
        values = fx.map_arg(node.args, lambda x: _on_host(x.meta["val"]))
        node.meta["val"] = target(*values)
    return node


def _on_host(value: Any) -> Any:
    """A parameter's record on the meta device, where those of the graph's inputs are."""
    if isinstance(value, Tensor) and value.is_meta and not isinstance(value, FakeTensor):
        return torch.empty(value.shape, dtype=value.dtype)
    return value


def same_shape(left: Node, right: Node) -> bool:
    """Whether two nodes have one shape at every size."""
    first, second = left.meta["val"].shape, right.meta["val"].shape
    return len(first) == len(second) and all(
        statically_known_true(a == b) for a, b in zip(first, second, strict=True)
    )
