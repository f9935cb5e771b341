"""Run parts of a graph: whole, block by block, or one region on chosen values.

Parameters are read where they are used and not held, so that a float64 run of a float32 model
needs memory for one weight and not for the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from fptq_compiler.graph.rows import PIECE, Rows
from fptq_compiler.graph.stored import StoredParameter

HALF_OR_SINGLE = (torch.float32, torch.float16, torch.bfloat16)
CACHE_PREFIX = "past_key_values"
ROWS = 3  # stands for a size that depends on values, as how many tokens an expert gets
Environment = dict[Node, Any]
Watcher = Callable[[Node, Any], None]


def attribute(module: torch.nn.Module, target: str) -> Any:
    """The parameter, buffer or submodule that a `get_attr` or `call_module` node names."""
    found = held(module, target)
    return found.read() if isinstance(found, StoredParameter) else found


def held(module: torch.nn.Module, target: str) -> Any:
    """The same as it stands in the module: values that lie in a file are not read."""
    found: Any = module
    for part in target.split("."):
        found = getattr(found, part)
    return found


def _in_precision(value: Any, dtype: torch.dtype | None) -> Any:
    if dtype is None:
        return value
    if isinstance(value, Tensor) and value.is_complex():
        return value.to(torch.complex128) if dtype == torch.float64 else value
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype)
    if isinstance(value, torch.dtype) and value in HALF_OR_SINGLE:
        return dtype
    return value


def run_node(
    module: fx.GraphModule, node: Node, environment: Environment, dtype: torch.dtype | None
) -> Any:
    """The value of one node; its inputs are in `environment` or are parameters."""

    def load(argument: Node) -> Any:
        if argument.op == "get_attr" and argument not in environment:
            found = attribute(module, str(argument.target))
            if dtype is not None and isinstance(found, fx.GraphModule):
                return _subgraph(found, dtype)
            if dtype is not None and _is_long(found):
                return Rows(found, dtype)
            return _in_precision(found, dtype)
        return environment[argument]

    args = fx.map_arg(node.args, load)
    kwargs = fx.map_arg(node.kwargs, load)
    if dtype is not None:
        args = fx.node.map_aggregate(args, lambda x: _in_precision(x, dtype))
        kwargs = fx.node.map_aggregate(kwargs, lambda x: _in_precision(x, dtype))
    if dtype is not None and any(isinstance(x, Rows) for x in args):
        found = _by_rows(module, node, args)
        if found is not None:
            return found
        args = fx.node.map_aggregate(args, lambda x: x.whole() if isinstance(x, Rows) else x)
    if node.op == "call_function":
        is_view = node.target is torch.ops.aten.view.default
        # In another run, on other values, strides may be others.
        target = torch.ops.aten.reshape.default if is_view else node.target
        assert callable(target)
        return target(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.op == "call_module":
        return attribute(module, str(node.target))(*args, **kwargs)
    if node.op == "output":
        return args[0]
    message = f"node {node.name} has the unexpected kind {node.op}"
    raise ValueError(message)


def _is_long(value: Any) -> bool:
    """Whether it is a weight that is taken a few rows at a time."""
    return (
        isinstance(value, Tensor) and value.dim() == 2 and value.is_floating_point()
        and value.numel() > PIECE
    )


def _by_rows(module: fx.GraphModule, node: Node, args: Sequence[Any]) -> Tensor | Rows | None:
    """The value of a node that takes a weight row by row; None where it needs the whole."""
    match node.target, args:
        case torch.ops.aten.linear.default, (Tensor() as x, Rows() as weight, *bias):
            return weight.linear(x, *bias)
        case torch.ops.aten.embedding.default, (Rows() as table, Tensor() as ids, *_):
            return table.embedding(ids)
        case str(path), (Rows() as weight,) if node.op == "call_module":
            edge = attribute(module, path)
            return weight.through(edge) if getattr(edge, "by_rows", False) else None
    return None


def arguments(module: fx.GraphModule, node: Node, environment: Environment) -> Any:
    """The positional arguments of a node, with the values of those that are nodes."""

    def load(argument: Node) -> Any:
        if argument.op == "get_attr" and argument not in environment:
            return attribute(module, str(argument.target))
        return environment[argument]

    return fx.map_arg(node.args, load)


def _subgraph(module: fx.GraphModule, dtype: torch.dtype) -> Callable[..., Any]:
    """What a wrapper operator (grad mode off) calls, in another precision throughout."""

    def call(*inputs: Any) -> Any:
        return run(module, inputs, dtype=dtype)

    return call


def last_uses(nodes: Sequence[Node]) -> dict[Node, list[Node]]:
    """For each node of the run, the values that nothing after it reads."""
    dying: dict[Node, list[Node]] = {}
    seen: set[Node] = set()
    for node in reversed(nodes):
        for argument in node.all_input_nodes:
            if argument not in seen:
                seen.add(argument)
                dying.setdefault(node, []).append(argument)
    return dying


def bind_inputs(
    module: fx.GraphModule, inputs: Sequence[Tensor], dtype: torch.dtype | None
) -> Environment:
    """Placeholders with their values; raises ValueError where the counts differ."""
    names = [n for n in module.graph.nodes if n.op == "placeholder"]
    return {n: _in_precision(x, dtype) for n, x in zip(names, inputs, strict=True)}


def run(
    module: fx.GraphModule,
    inputs: Sequence[Tensor],
    *,
    dtype: torch.dtype | None = None,
    watch: Watcher | None = None,
) -> Any:
    """Run the graph on `inputs`; with `dtype`, in that precision throughout.

    Args:
        module: the graph with its parameters.
        inputs: one tensor a placeholder.
        dtype: `torch.float64` for verification; None runs as written.
        watch: called with every node and its value.

    Returns:
        What the output node holds (a tuple).
    """
    nodes = [n for n in module.graph.nodes if n.op not in ("placeholder", "get_attr")]
    environment = bind_inputs(module, inputs, dtype)
    dying = last_uses(nodes)
    value: Any = None
    for node in nodes:
        value = run_node(module, node, environment, dtype)
        if watch is not None:
            watch(node, value)
        environment[node] = value
        for dead in dying.get(node, ()):
            environment.pop(dead, None)
    return value


def logits(
    module: fx.GraphModule, inputs: Sequence[Tensor], dtype: torch.dtype | None = None
) -> Tensor:
    """The first output of the graph: (batch, sequence, vocabulary)."""
    found = run(module, inputs, dtype=dtype)
    first = found[0] if isinstance(found, (tuple, list)) else found
    assert isinstance(first, Tensor)
    return first


def ancestors(target: Node, stop: Iterable[Node] = ()) -> list[Node]:
    """All that `target` is computed from, itself last, not looking behind `stop`."""
    order: list[Node] = []
    seen = set(stop)
    stack: list[tuple[Node, bool]] = [(target, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((x, False) for x in node.all_input_nodes)
    return order


class Region:
    """Evaluates single nodes in float64 with some upstream values replaced.

    Everything that depends on the inputs' sizes only (positions, masks, rotary tables) is
    computed from the placeholders, which hold plain values of the given sizes.
    """

    def __init__(self, module: fx.GraphModule, batch: int, sequence: int) -> None:
        self._module = module
        self._cache: Environment = dict(default_inputs(module, batch, sequence))
        self._symbols = {}
        for node, value in self._cache.items():
            for size, found in zip(node.meta["val"].shape, value.shape, strict=True):
                if isinstance(size, torch.SymInt):
                    self._symbols[size.node.expr] = found

    def shape(self, node: Node) -> tuple[int, ...]:
        """The shape that `node` has at this region's sizes."""
        return self.sizes(node.meta["val"].shape)

    def sizes(self, shape: Sequence[int | torch.SymInt]) -> tuple[int, ...]:
        """A recorded shape at this region's sizes; what depends on values is `ROWS`."""
        return tuple(self._size(size) for size in shape)

    def _size(self, size: int | torch.SymInt) -> int:
        if not isinstance(size, torch.SymInt):
            return size
        found = size.node.expr.subs(self._symbols)
        return int(found.subs(dict.fromkeys(found.free_symbols, ROWS)))

    def value(self, target: Node, bound: Mapping[Node, Tensor]) -> Any:
        """The value of `target` where each node of `bound` has the given value."""
        if target.op == "get_attr":
            return _in_precision(attribute(self._module, str(target.target)), torch.float64)
        environment: Environment = dict(bound)
        dependent = set(bound)
        for node in ancestors(target, bound):
            if node.op == "get_attr":
                continue
            if not dependent.isdisjoint(node.all_input_nodes):
                dependent.add(node)
            elif node in self._cache:
                environment[node] = self._cache[node]
                continue
            environment[node] = run_node(self._module, node, environment, torch.float64)
            if node not in dependent:
                self._cache[node] = environment[node]
        return environment[target]


def default_inputs(
    module: fx.GraphModule, batch: int, sequence: int, past: int = 0
) -> dict[Node, Tensor]:
    """Plain values for the placeholders: ids 0, positions 0 1 2 …, masks that hide nothing.

    Caches hold `past` tokens, all zero.
    """
    return {
        node: _default_value(node, batch, sequence, past)
        for node in module.graph.nodes
        if node.op == "placeholder"
    }


def _default_value(node: Node, batch: int, sequence: int, past: int) -> Tensor:
    fake = node.meta["val"]
    if node.name.startswith(CACHE_PREFIX):
        return torch.zeros((batch, fake.shape[1], past, fake.shape[3]), dtype=fake.dtype)
    if node.name == "attention_mask" and fake.is_meta:  # add_cache's own
        return torch.ones((batch, past + sequence), dtype=fake.dtype)
    sizes = [batch, sequence]
    shape = [
        int(size) if isinstance(size, int) else sizes[min(axis, 1)]
        for axis, size in enumerate(fake.shape)
    ]
    if "position" in node.name and not fake.dtype.is_floating_point:
        return torch.arange(shape[-1], dtype=fake.dtype).expand(shape).contiguous()
    fill = 1 if "mask" in node.name and not fake.dtype.is_floating_point else 0
    return torch.full(shape, fill, dtype=fake.dtype)


def longest_sequence(module: fx.GraphModule) -> int | None:
    """The export's bound on the length of the first input, in tokens; None without one."""
    for node in module.graph.nodes:
        if node.op == "placeholder" and node.meta["val"].dim() >= 2:
            size = node.meta["val"].shape[1]
            if not isinstance(size, torch.SymInt):
                return int(size)
            environment = size.node.shape_env
            bound = environment.var_to_range.get(size.node.expr) if environment else None
            if bound is None or not bound.upper.is_Integer:
                return None
            return int(bound.upper)
    return None
