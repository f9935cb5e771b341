"""Lay the heads side by side once, where a model never does: behind a norm, or in a packed view.

    before  norm (B, S, H, D) -> RoPE
    after   norm (B, S, H, D) -> (B, S, H·D) -> (B, S, H, D) -> RoPE

A cached attention reads its operands before RoPE in that form.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from fptq_compiler.graph.evaluate import ancestors
from fptq_compiler.graph.probe import EXACT, Probe
from fptq_compiler.graph.shaped import shaped_call
from fptq_compiler.passes.attention_operands import linears

aten = torch.ops.aten
TOKENS_FIRST, HEADS_FIRST = (0, 1, 2, 3), (0, 2, 1, 3)


def merge_heads(probe: Probe, operand: Node) -> bool:
    """Merge and split the heads at the earliest value of which `operand` is a linear map.

    Up to that value every position is treated alike.

    Args:
        probe: of the graph.
        operand: of attention, (B, H, S, D).

    Returns:
        Whether there is one.
    """
    batch, heads, sequence, width = probe.region.shape(operand)
    forms: dict[tuple[int, ...], tuple[int, ...]] = {
        (batch, sequence, heads, width): TOKENS_FIRST,
        (batch, heads, sequence, width): HEADS_FIRST,
    }
    for node in ancestors(operand, linears(operand)):
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        order = forms.get(probe.region.shape(node))
        if order is None or not _is_linear(probe, node, operand):
            continue
        if _is_alike(probe, node, order):
            _merge(node, order, heads, width)
            return True
    return False


def _is_linear(probe: Probe, source: Node, target: Node) -> bool:
    """Whether `target` depends on `source` alone, and linearly."""
    generator = torch.Generator().manual_seed(13)
    first, second = torch.randn(
        (2, *probe.region.shape(source)), generator=generator, dtype=torch.float64
    )

    def at(x: Tensor) -> Tensor:
        found: Tensor = probe.region.value(target, {source: x})
        return found

    expected = 2 * at(first) - 3 * at(second)
    found = at(2 * first - 3 * second)
    zero = at(torch.zeros_like(first)).abs().max()
    return bool(zero == 0 and (found - expected).abs().max() <= EXACT * expected.abs().max())


def _is_alike(probe: Probe, node: Node, order: tuple[int, ...]) -> bool:
    """Whether tokens that are alike behind the linears are alike here, at every position."""
    bound = {}
    for linear in linears(node):
        shape = probe.region.shape(linear)
        generator = torch.Generator().manual_seed(17)
        token = torch.randn(shape[-1], generator=generator, dtype=torch.float64)
        bound[linear] = token.expand(shape).contiguous()
    found = probe.region.value(node, bound).permute(order)
    return bool((found - found[:1, :1]).abs().max() <= EXACT * found.abs().max())


def _merge(node: Node, order: tuple[int, ...], heads: int, width: int) -> None:
    readers = list(node.users)
    before, graph = node.next, node.graph
    x = node
    if order == HEADS_FIRST:
        x = shaped_call(graph, before, aten.transpose.int, (x, 1, 2), like=node)
    merged = shaped_call(graph, before, aten.flatten.using_ints, (x, 2), like=node)
    x = shaped_call(graph, before, aten.unflatten.int, (merged, 2, [heads, width]), like=node)
    if order == HEADS_FIRST:
        x = shaped_call(graph, before, aten.transpose.int, (x, 1, 2), like=node)
    for reader in readers:
        reader.replace_input_with(node, x)
        if reader.target is aten.view.default:
            reader.target = aten.reshape.default
