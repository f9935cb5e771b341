"""The few ways in which passes change a graph. They know nothing of quantisation or transforms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Node

from fptq_compiler.graph.evaluate import attribute, held
from fptq_compiler.graph.stored import StoredParameter

aten = torch.ops.aten


def call(
    graph: fx.Graph,
    before: Node,
    target: Callable[..., Any],
    args: Sequence[Any],
    *,
    like: Node | None,
    name: str | None = None,
) -> Node:
    """Insert a call in front of `before`; its value looks like that of `like` (None: unknown)."""
    with graph.inserting_before(before):
        node = graph.create_node("call_function", target, tuple(args), {}, name=name)
    if like is not None:
        node.meta = {k: like.meta[k] for k in ("val", "stack_trace", "nn_module_stack")
                     if k in like.meta}
    return node


def record(node: Node) -> Node:
    """Note what a new call gives, from what is noted of its inputs, none of them parameters."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    assert callable(node.target)
    node.meta["val"] = node.target(*args, **kwargs)
    return node


def call_module(
    graph: fx.Graph, before: Node, path: str, args: Sequence[Any], *, like: Node
) -> Node:
    """Insert a call of the submodule at `path` in front of `before`."""
    with graph.inserting_before(before):
        node = graph.create_node("call_module", path, tuple(args), {}, name=path.replace(".", "_"))
    node.meta = {k: like.meta[k] for k in ("val", "stack_trace") if k in like.meta}
    return node


def replace(old: Node, new: Any) -> None:
    """Every reader of `old` reads `new`; `old` is erased, dead inputs stay for `clean`."""
    graph = old.graph
    if isinstance(new, Node):
        old.replace_all_uses_with(new)
    graph.erase_node(old)


def read_instead(old: Node, new: Node) -> None:
    """Every reader of `old` reads `new`, which may lie in memory in another order.

    A view of such a value may have to copy: it becomes a reshape.
    """
    for reader in old.users:
        if reader.target is aten.view.default:
            reader.target = aten.reshape.default
    old.replace_all_uses_with(new)


def add_module(module: nn.Module, path: str, child: nn.Module) -> None:
    """Put `child` at a dotted path, making the folders on the way."""
    *folders, last = path.split(".")
    parent = module
    for folder in folders:
        if not hasattr(parent, folder):
            parent.add_module(folder, nn.Module())
        parent = getattr(parent, folder)
    parent.add_module(last, child)


def owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The submodule that holds a dotted name, and the name's last part."""
    folder, _, last = name.rpartition(".")
    return (attribute(module, folder) if folder else module), last


def set_parameter(
    module: nn.Module, name: str, value: Tensor, *, made_of: str | None = None
) -> None:
    """Replace, or make, the parameter (or, for integers, buffer) of a dotted name.

    What replaces a stored parameter, or is `made_of` one, is stored.
    """
    origin = held(module, made_of) if made_of is not None else None
    *folders, last = name.split(".")
    parent = module
    for folder in folders:
        if not hasattr(parent, folder):
            parent.add_module(folder, nn.Module())
        parent = getattr(parent, folder)
    replaced = parent._parameters.pop(last, None)
    parent._buffers.pop(last, None)
    if hasattr(parent, last):
        delattr(parent, last)
    for old in (replaced, origin):
        if isinstance(old, StoredParameter):
            value = old.replaced_by(value)
    if isinstance(value, StoredParameter):
        parent.register_parameter(last, value)
    elif value.is_floating_point():
        parent.register_parameter(last, nn.Parameter(value.detach(), requires_grad=False))
    else:
        parent.register_buffer(last, value.detach())


def has_attribute(module: nn.Module, name: str) -> bool:
    """Whether a dotted name is taken, by a parameter, buffer or submodule."""
    try:
        held(module, name)
    except AttributeError:
        return False
    return True


def free_name(module: nn.Module, wanted: str) -> str:
    """The wanted dotted name, with a number behind it where it is taken."""
    name, number = wanted, 1
    while has_attribute(module, name):
        name, number = f"{wanted}_{number}", number + 1
    return name


def get_parameter(graph: fx.Graph, before: Node, name: str, value: Tensor) -> Node:
    """A `get_attr` node for the parameter `name`, in front of `before`."""
    with graph.inserting_before(before):
        node = graph.create_node("get_attr", name, name=name.replace(".", "_"))
    node.meta = {"val": torch.empty_like(value, device="meta")}
    return node


def clean(module: fx.GraphModule) -> None:
    """The one exit of every pass: drop dead nodes and unused state, check, recompile."""
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    used = {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
    called = tuple(f"{n.target}." for n in module.graph.nodes if n.op == "call_module")
    names = [n for n, _ in module.named_parameters(remove_duplicate=False)]
    names += [n for n, _ in module.named_buffers(remove_duplicate=False)]
    for name in names:
        if name not in used and not name.startswith(called):
            parent, last = owner(module, name)
            delattr(parent, last)
    module.graph.lint()
    module.recompile()
