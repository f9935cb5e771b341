"""Raise every product of an activation and a parameter to `aten.linear`, (out, in) as torch's.

    addmm(b, view(x, (B·S, in)), W)         linear(x, Wᵀ, b)     GPT-2's Conv1D
    mm(view(x, (B·S, in)), permute(W))      linear(x, W)         after run_decompositions
    bmm(x, expand(W))                       linear(x, Wᵀ)        a weight repeated for the batch
    matmul(x, W) + b                        linear(x, Wᵀ, b)

Which weight the product multiplies with is found by evaluating it; a weight that comes out as its
parameter is that parameter, another is stored under the parameter's name where nothing else reads
it. Views that merge the leading axes in front of a linear go behind it, where they mostly meet
the ones that take the axes apart again, and cancel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from fptq_compiler.graph.evaluate import Region
from fptq_compiler.graph.inputs import input_node
from fptq_compiler.graph.pipeline import Pass, PassResult
from fptq_compiler.graph.probe import Probe
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.shaped import same_shape, shaped_call
from fptq_compiler.graph.surgery import (
    call,
    get_parameter,
    has_attribute,
    read_instead,
    replace,
    set_parameter,
)
from fptq_compiler.passes.linears import LINEAR, MOVES, is_linear, parameter_readers

aten = torch.ops.aten
PRODUCTS = (aten.mm.default, aten.bmm.default, aten.matmul.default)
VIEWS = (
    aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int,
)


class RaiseLinears(Pass):
    """Replace products with parameters, take biases in, and cancel views around linears."""

    requires = ("canonical",)
    provides = ("linears_raised",)

    def run(self, program: Program) -> PassResult:
        """Rewrite the whole graph."""
        changed = 0
        region = Region(program.module, 2, 13)
        for node in list(program.graph.nodes):
            product = _product(node)
            if product is not None:
                changed += _raise(program, region, node, product)
        for node in program.call_nodes(LINEAR):
            changed += _keep_axes(node)
        changed += cancel_moves(program)
        program.graph.eliminate_dead_code()
        for node in list(program.graph.nodes):
            if node.target is aten.add.Tensor:
                changed += _take_bias(program, region, node)
        return PassResult(changed)


@dataclass(frozen=True)
class _Product:
    """The operands of a product; the weight is `parameter`, moved to (..., in, out)."""

    x: Node
    weight: Node
    bias: tuple[Node, ...]
    parameter: Node
    transposed: bool


def _product(node: Node) -> _Product | None:
    """A product of an activation and one parameter whose values are moved, not changed."""
    with_bias = node.target is aten.addmm.default and not node.kwargs
    if not with_bias and node.target is not LINEAR and node.target not in PRODUCTS:
        return None
    first = 1 if with_bias else 0
    x, weight = input_node(node, first), input_node(node, first + 1)
    bias = tuple(n for n in node.all_input_nodes if n not in (x, weight))
    parameter = _moved(weight)
    known = node.target is LINEAR and parameter is weight
    if parameter is None or known or any(b.op != "get_attr" for b in bias):
        return None
    if weight.meta["val"].dim() < 2 or _moved(x) is not None:
        return None
    return _Product(x, weight, bias, parameter, node.target is LINEAR)


def _moved(node: Node) -> Node | None:
    """The parameter that a chain of moves begins with; None where it does not."""
    while node.target in (*MOVES, aten.t.default, aten.expand.default):
        node = input_node(node)
    return node if node.op == "get_attr" else None


@torch.no_grad()
def _raise(program: Program, region: Region, node: Node, product: _Product) -> int:
    """Replace one product where its weight is one matrix; a stack of different ones stays."""
    stored = program.parameter(str(product.parameter.target))
    value = region.value(product.weight, {})
    stack = value.reshape(-1, *value.shape[-2:])
    if not bool((stack == stack[:1]).all()):
        return 0
    weight = stack[0] if product.transposed else stack[0].T
    found = _weight(program, node, product.parameter, weight.to(stored.dtype), stored)
    arguments = (product.x, found, *product.bias)
    replace(node, call(program.graph, node, LINEAR, arguments, like=node))
    return 1


def _weight(program: Program, node: Node, parameter: Node, weight: Tensor, stored: Tensor) -> Node:
    """A `get_attr` node of the weight (out, in), under the parameter's name where it may be."""
    name = str(parameter.target)
    if not torch.equal(weight, stored):
        if parameter_readers(program, parameter) > 1:
            name = _fresh(program, f"{name}_linear")
        set_parameter(program.module, name, weight.contiguous())
    return get_parameter(program.graph, node, name, weight)


def _fresh(program: Program, base: str) -> str:
    name, count = base, 1
    while has_attribute(program.module, name):
        count += 1
        name = f"{base}{count}"
    return name


def _keep_axes(linear: Node) -> int:
    """Move a view that merges leading axes from in front of a linear to behind it."""
    view = input_node(linear)
    if view.target not in VIEWS:
        return 0
    merged = view.meta["val"].shape
    source, axis = _with_more_axes(view)
    if axis < 2 or any(size != 1 for size in merged[:-2]) or len(merged) < 2:
        return 0
    graph, sizes = linear.graph, source.meta["val"].shape
    x = source
    if axis < len(sizes) - 1:
        x = shaped_call(graph, linear, aten.flatten.using_ints, (source, axis), like=view)
    weight = input_node(linear, 1)
    y = call(graph, linear, LINEAR, (x, *linear.args[1:]), like=linear)
    y.meta["val"] = linear.meta["val"].new_empty((*sizes[:axis], weight.meta["val"].shape[0]))
    back = shaped_call(graph, linear, aten.flatten.using_ints, (y, 0, axis - 1), like=linear)
    for _ in merged[:-2]:
        back = shaped_call(graph, linear, aten.unsqueeze.default, (back, 0), like=linear)
    replace(linear, back)
    return 1


def _with_more_axes(view: Node) -> tuple[Node, int]:
    """The earliest value of which `view` only merges axes, and where the inner ones begin."""
    found, found_axis, source = view, 0, view
    while source.target in VIEWS:
        source = input_node(source)
        axis = _first_inner_axis(source.meta["val"].shape, view.meta["val"].shape[-1])
        if axis >= 2:
            found, found_axis = source, axis
    return found, found_axis


def _first_inner_axis(sizes: torch.Size, width: int) -> int:
    """Where the axes begin whose product is `width`; 0 where there are none."""
    for axis in range(len(sizes) - 1, 0, -1):
        inner = sizes[axis:]
        if not all(isinstance(size, int) for size in inner):
            return 0
        if math.prod(inner) == width and (axis == 1 or sizes[axis - 1] != 1):
            return axis
    return 0


def cancel_moves(program: Program) -> int:
    """Readers of moves that undo each other read what stood in front; gives how many."""
    probe = Probe(program.module)
    changed = 0
    for node in list(program.graph.nodes):
        if node.target not in MOVES or not node.users:
            continue
        source = _undone(probe, node)
        if source is not None:
            read_instead(node, source)
            changed += 1
    return changed


def _undone(probe: Probe, node: Node) -> Node | None:
    """The earliest value in front of a chain of moves that `node` equals."""
    found = None
    source = node
    while source.target in MOVES:
        (source,) = (x for x in source.all_input_nodes if isinstance(x.meta.get("val"), Tensor))
        if same_shape(source, node) and probe.equals(source, node):
            found = source
    return found


@torch.no_grad()
def _take_bias(program: Program, region: Region, node: Node) -> int:
    """Put a parameter that is added behind a linear, or behind its split heads, into it."""
    for y, bias in ((node.args[0], node.args[1]), (node.args[1], node.args[0])):
        if not isinstance(bias, Node) or bias.op != "get_attr" or node.kwargs:
            continue
        if not isinstance(y, Node) or y.op == "get_attr":
            continue
        linear = _only_linear(y)
        if linear is None or not same_shape(node, y):
            continue
        stored = program.parameter(str(bias.target))
        added = _per_channel(region, linear, y, stored)
        if added is None:
            continue
        name = str(bias.target)
        if added.shape != stored.shape or not torch.equal(added, stored):
            if parameter_readers(program, bias) > 1:
                name = _fresh(program, f"{name}_linear")
            set_parameter(program.module, name, added)
        linear.args = (*linear.args, get_parameter(program.graph, linear, name, added))
        replace(node, y)
        return 1
    return 0


def _only_linear(y: Node) -> Node | None:
    """The linear without a bias that `y` is, moved, where nothing else reads it."""
    while len(y.users) == 1 and y.target in MOVES:
        y = input_node(y)
    return y if is_linear(y) and len(y.users) == 1 and len(y.args) == 2 else None


def _per_channel(region: Region, linear: Node, y: Node, bias: Tensor) -> Tensor | None:
    """The bias by output channel of the linear; None where it is none of one channel each."""
    width = linear.meta["val"].shape[-1]
    shape = region.shape(linear)
    channel = torch.arange(width, dtype=torch.float64).expand(shape)
    channels = region.value(y, {linear: channel}).long()
    added = bias.expand(channels.shape)
    found = bias.new_zeros(width)
    found[channels] = added
    return found if torch.equal(found[channels], added) else None
