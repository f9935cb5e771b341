"""Inputs beside token ids that have a plain value: attention masks and positions."""

from __future__ import annotations

from torch import Tensor
from torch.fx import Node


def is_mask(node: Node) -> bool:
    """An input that shows or hides the tokens (B, T)."""
    return "mask" in node.name and _is_integer(node, (2,))


def is_positions(node: Node) -> bool:
    """An input that holds the positions (S,) or (B, S)."""
    return "position" in node.name and _is_integer(node, (1, 2))


def _is_integer(node: Node, ranks: tuple[int, ...]) -> bool:
    value = node.meta.get("val")
    return (
        isinstance(value, Tensor) and not value.is_floating_point() and value.dim() in ranks
    )
