"""Write every einsum of two operands as permutations and one matmul.

    einsum("bshe,bthe->bhst", q, k)    matmul(q as (b, h, s, e), k as (b, h, e, t))

Letters that both operands and the result have are axes of a batch; letters that only the operands
have are contracted; the others are rows and columns. Where there are several contracted letters,
several rows or several columns, these are one axis in the matmul and apart again behind it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from fptq_compiler.graph.pipeline import Pass, PassResult
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.shaped import shaped_call
from fptq_compiler.graph.surgery import replace

aten = torch.ops.aten


class ExpandEinsum(Pass):
    """Replace einsums of two operands, each letter once in each; others stay as they are."""

    requires = ("canonical",)

    def run(self, program: Program) -> PassResult:
        """Rewrite the whole graph."""
        changed = 0
        for node in program.call_nodes(aten.einsum.default):
            letters = _letters(node)
            if letters is not None:
                replace(node, _expand(node, letters))
                changed += 1
        return PassResult(changed)


@dataclass(frozen=True)
class _Letters:
    """The axes by letter: of a batch, of rows, of columns, and those that are summed."""

    left: str
    right: str
    result: str
    batch: str
    rows: str
    columns: str
    summed: str


def _letters(node: Node) -> _Letters | None:
    equation, operands = node.args[0], node.args[1]
    assert isinstance(equation, str)
    assert isinstance(operands, (list, tuple))
    if len(operands) != 2 or "." in equation or "->" not in equation:
        return None
    inputs, result = equation.replace(" ", "").split("->")
    left, right = inputs.split(",")
    if any(len(set(x)) != len(x) for x in (left, right, result)):
        return None
    rows = "".join(c for c in result if c in left and c not in right)
    columns = "".join(c for c in result if c in right and c not in left)
    batch = "".join(c for c in result if c in left and c in right)
    summed = "".join(c for c in left if c in right and c not in result)
    alone = set(left) ^ set(right)
    if not summed or not alone <= set(result):
        return None
    return _Letters(left, right, result, batch, rows, columns, summed)


def _expand(node: Node, letters: _Letters) -> Node:
    operands = node.args[1]
    assert isinstance(operands, (list, tuple))
    first, second = operands
    assert isinstance(first, Node)
    assert isinstance(second, Node)
    batch = len(letters.batch)
    left = _grouped(node, first, letters.left, (letters.batch, letters.rows, letters.summed))
    right = _grouped(node, second, letters.right, (letters.batch, letters.summed, letters.columns))
    product = shaped_call(node.graph, node, aten.matmul.default, (left, right), like=node)
    product = _apart(node, product, batch, letters.rows, first, letters.left)
    position = batch + len(letters.rows)
    product = _apart(node, product, position, letters.columns, second, letters.right)
    order = letters.batch + letters.rows + letters.columns
    return _permuted(node, product, order, letters.result)


def _grouped(node: Node, operand: Node, letters: str, groups: tuple[str, str, str]) -> Node:
    """The operand as (batch..., one axis, one axis)."""
    graph = node.graph
    found = _permuted(node, operand, letters, "".join(groups))
    start = len(groups[0])
    for group in groups[1:]:
        if not group:
            found = shaped_call(graph, node, aten.unsqueeze.default, (found, start), like=node)
        elif len(group) > 1:
            axes = (found, start, start + len(group) - 1)
            found = shaped_call(graph, node, aten.flatten.using_ints, axes, like=node)
        start += 1
    return found


def _permuted(node: Node, operand: Node, letters: str, order: str) -> Node:
    if letters == order:
        return operand
    axes = [letters.index(c) for c in order]
    return shaped_call(node.graph, node, aten.permute.default, (operand, axes), like=node)


def _apart(
    node: Node, product: Node, axis: int, group: str, operand: Node, letters: str
) -> Node:
    """One axis of the product as the axes of the operand that it was made of."""
    if len(group) == 1:
        return product
    if not group:
        return shaped_call(node.graph, node, aten.squeeze.dim, (product, axis), like=node)
    sizes = [_size(node, operand, letters.index(c)) for c in group]
    return shaped_call(node.graph, node, aten.unflatten.int, (product, axis, sizes), like=node)


def _size(node: Node, operand: Node, axis: int) -> int | Node:
    size = operand.meta["val"].shape[axis]
    if isinstance(size, int):
        return size
    return shaped_call(node.graph, node, aten.sym_size.int, (operand, axis), like=node)
