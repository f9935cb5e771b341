"""Read what stands between two products of an attention: scale, soft-capping and masks.

The anchor is a softmax. Behind it lies the nearest product of two activations, in front of it the
first product that reads it. Every step between is interpreted in order; what the whole computes
is then proved by running it (raise_attention), so that this reading may be wrong but not unsafe.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.fx import Node

from fptq_compiler.graph import ops
from fptq_compiler.graph.evaluate import Region, run_node
from fptq_compiler.graph.inputs import input_node
from fptq_compiler.graph.patterns import words
from fptq_compiler.graph.surgery import call
from fptq_compiler.passes.canonicalize import CASTS
from fptq_compiler.passes.linears import LINEAR, MOVES

aten = torch.ops.aten
SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
PRODUCTS = (aten.matmul.default, aten.bmm.default)
SHIFTED_PRODUCT = aten.baddbmm.default
MULTIPLY = (aten.mul.Tensor, aten.mul.Scalar)
DIVIDE = (aten.div.Tensor, aten.div.Scalar)
ADD = (aten.add.Tensor, aten.add.Scalar)
SUBTRACT = (aten.sub.Tensor, aten.sub.Scalar)
FILL = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
WHERE = (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)
BARRIERS = (LINEAR, aten.embedding.default, *SOFTMAX, ops.attention)
HIDDEN = -1e4
"""Scores below this count as hidden."""


class NoCoreError(Exception):
    """Why a softmax is no attention that can be raised; carries the node."""

    def __init__(self, reason: str, node: Node) -> None:
        super().__init__(reason)
        self.node = node


def refuse(reason: str, node: Node) -> NoReturn:
    """Raise NoCoreError."""
    raise NoCoreError(reason, node)


def _name(node: Node) -> str:
    return str(node.target).removesuffix(".default").removesuffix(".Tensor")


@dataclass(frozen=True)
class Mask:
    """A mask: booleans that show, or numbers to add, and the scores that it applies to."""

    node: Node
    at: Node

    @property
    def source(self) -> Node:
        """The mask as the model has it."""
        made = self.node.target in (aten.logical_not.default, aten.neg.default)
        source = self.node.args[0] if made else self.node
        assert isinstance(source, Node)
        return source


@dataclass
class Core:
    """An attention: its two products, and what happens to the scores between them.

    Attributes:
        product: scores (..., S, T) of queries (..., S, D) and keys (..., D, T).
        scores: what the softmax reads.
        softmax: the softmax.
        mixing: the product of the weights (..., S, T) and the values (..., T, D).
        scale: of the scores.
        softcap: 0 for none.
        masks: in order.
    """

    product: Node
    scores: Node
    softmax: Node
    mixing: Node
    scale: float = 1.0
    softcap: float = 0.0
    masks: list[Mask] = field(default_factory=list)


def attends(softmax: Node) -> bool:
    """Whether a softmax may be attention's: a product of two activations is behind it or reads it.

    A router's softmax is over experts, and neither is true of it.
    """
    try:
        return _holds_product(softmax.args[0]) or _is_product(_mixing(softmax))
    except NoCoreError:
        return False


def read_core(region: Region, softmax: Node) -> Core:
    """The attention around a softmax.

    Raises:
        NoCoreError: it is not one that can be raised.
    """
    path = _to_product(softmax)
    mixing = _mixing(softmax)
    product, *between = path
    scores = input_node(softmax)
    core = Core(product, scores, softmax, mixing)
    if product.target is SHIFTED_PRODUCT:
        _read_shift(region, core)
    capping = False
    for source, node in zip(path, between, strict=False):
        capping = _read_step(region, core, source, node, capping)
    _check_axes(region, core, between)
    return core


def activations(node: Node) -> bool:
    """Whether the value comes from a linear layer, an embedding or an input of numbers."""
    return any(
        n.target in (LINEAR, aten.embedding.default)
        or (n.op == "placeholder" and n.meta["val"].is_floating_point())
        for n in _behind(node)
    )


def _to_product(softmax: Node) -> list[Node]:
    """From the product of two activations to what the softmax reads."""
    path: list[Node] = []
    node = input_node(softmax)
    while True:
        path.insert(0, node)
        if _is_product(node):
            return path
        before = [x for x in dict.fromkeys(node.all_input_nodes) if _holds_product(x)]
        if not before:
            refuse("no product of two activations stands behind the softmax", softmax)
        if len(before) > 1:
            refuse(f"{node.name} ({_name(node)}) reads the scores in two ways", node)
        node = before[0]


def _is_product(node: Node) -> bool:
    """A product of which both operands come from activations: of tables of angles neither does."""
    if node.target not in (*PRODUCTS, SHIFTED_PRODUCT):
        return False
    return all(isinstance(x, Node) and activations(x) for x in node.args[-2:])


def _holds_product(node: Any) -> bool:
    return any(_is_product(n) for n in _behind(node) if n.target not in BARRIERS)


def _behind(node: Node) -> Iterator[Node]:
    """What `node` is computed from, itself first, up to linear layers and the like."""
    stack, seen = [node], set()
    while stack:
        found = stack.pop()
        if found in seen:
            continue
        seen.add(found)
        yield found
        if found.target not in BARRIERS:
            stack.extend(found.all_input_nodes)


def _mixing(softmax: Node) -> Node:
    """The one product that reads the weights."""
    found: list[Node] = []
    frontier: list[Node] = [softmax]
    seen: set[Node] = set()
    while frontier:
        node = frontier.pop()
        if node in seen:
            continue
        seen.add(node)
        for reader in node.users:
            if reader.target in PRODUCTS:
                found.append(reader)
            elif reader.op == "output":
                refuse("the attention weights are an output of the model", reader)
            elif reader.target in (*CASTS, *MOVES, *WHERE, aten.expand.default):
                frontier.append(reader)
            elif reader.target not in (aten.sym_size.int, aten.full_like.default):
                refuse(f"{reader.name} ({_name(reader)}) reads the attention weights", reader)
    if len(set(found)) > 1:
        refuse(f"{len(set(found))} products read the attention weights", found[1])
    if not found:
        refuse("no product reads the softmax", softmax)
    return found[0]


def _read_shift(region: Region, core: Core) -> None:
    """Read beta * mask + alpha * scores."""
    node = core.product
    mask = input_node(node)
    beta, alpha = (node.kwargs.get(name, 1) for name in ("beta", "alpha"))
    assert isinstance(alpha, (int, float))
    core.scale *= alpha
    if beta == 0:
        return
    if beta != 1:
        refuse(f"the mask is multiplied by {beta}, expected 1", node)
    core.masks.append(Mask(mask, node))


def _read_step(region: Region, core: Core, source: Node, node: Node, capping: bool) -> bool:
    """Take one step into `core`; True behind a tanh whose product with the cap is to come."""
    others = [a for a in node.args if a is not source]
    if node.target in (*CASTS, *MOVES, aten.expand.default):
        return capping
    if node.target in (*MULTIPLY, *DIVIDE):
        if core.masks:
            refuse(f"{node.name} scales scores that are masked already", node)
        if node.target in DIVIDE and node.args[0] is not source:
            refuse(f"{node.name} divides by the scores", node)
        factor = _number(region, others[0], node)
        factor = 1.0 / factor if node.target in DIVIDE else factor
        if capping:
            core.softcap = factor
        elif core.softcap:
            refuse(f"{node.name} scales scores that are capped already", node)
        core.scale *= factor
        return False
    if node.target is aten.tanh.default and not (core.masks or core.softcap):
        core.softcap = 1.0
        return True
    if node.target in ADD and not node.kwargs and isinstance(others[0], Node):
        core.masks.append(Mask(others[0], node))
        return False
    if node.target in SUBTRACT and not node.kwargs and isinstance(others[0], Node):
        negative = call(node.graph, node, aten.neg.default, (others[0],), like=others[0])
        core.masks.append(Mask(negative, node))
        return False
    if node.target in (*FILL, *WHERE):
        core.masks.append(Mask(_shown(region, node, source), node))
        return False
    expected = words((aten.mul.Tensor, aten.tanh.default, aten.add.Tensor, aten.where.self))
    refuse(f"between scores and softmax expected {expected}, found {_name(node)}", node)


def _number(region: Region, value: object, node: Node) -> float:
    """A literal, or a tensor of one value that depends on no input."""
    if isinstance(value, (int, float)):
        return float(value)
    assert isinstance(value, Node)
    if activations(value):
        refuse("the scores are scaled by an activation, expected a number", node)
    found = region.value(value, {})
    if found.numel() != 1:
        refuse(f"the scores are scaled by {tuple(found.shape)} numbers, expected one", node)
    return float(found)


def _shown(region: Region, node: Node, source: Node) -> Node:
    """The mask of a fill as booleans that show."""
    if node.target in FILL:
        mask, fill, hides = node.args[1], node.args[2], True
    else:
        mask, hides = node.args[0], node.args[2] is source
        fill = node.args[1] if hides else node.args[2]
    assert isinstance(mask, Node)
    if mask is source:
        refuse(f"{node.name} hides scores by their own value", node)
    number = _number(region, fill, node)
    if number > HIDDEN:
        refuse(f"masked scores are set to {number}, expected minus infinity", node)
    if not hides:
        return mask
    return call(node.graph, node, aten.logical_not.default, (mask,), like=mask)


def _check_axes(region: Region, core: Core, between: list[Node]) -> None:
    """The softmax runs along the keys, and nothing is rearranged but by merging axes."""
    shape = region.shape(core.product)
    order = torch.arange(torch.Size(shape).numel()).reshape(shape)
    for node in between:
        if node.target in (*MOVES, aten.expand.default):
            order = _moved(region, node, order)
    axis = core.softmax.args[1]
    assert isinstance(axis, int)
    if axis % order.dim() != order.dim() - 1:
        refuse(f"softmax over axis {axis}, expected the last", core.softmax)
    if not torch.equal(order.flatten(), torch.arange(order.numel())):
        refuse("the scores are rearranged before the softmax", core.softmax)


def _moved(region: Region, node: Node, order: Tensor) -> Tensor:
    """What a move does to the numbers of the places."""
    environment = {
        x: region.value(x, {}) for x in node.all_input_nodes
        if not isinstance(x.meta.get("val"), Tensor)
    }
    (source,) = (x for x in node.all_input_nodes if x not in environment)
    module = node.graph.owning_module
    assert module is not None
    found = run_node(module, node, {**environment, source: order}, None)
    assert isinstance(found, Tensor)
    return found
