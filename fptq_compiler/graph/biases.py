"""A bias that a pass has made knows its linear, for it may be added further behind."""

from __future__ import annotations

from typing import Final

from torch.fx import Node

_OWNER: Final = "bias_of"


def own_bias(bias: Node, linear: str) -> None:
    """Note that this value (N,) is the bias of the linear node of this name."""
    bias.meta[_OWNER] = linear


def owner_of_bias(bias: Node) -> str | None:
    """The name of the linear node, or None where no pass has made the value its bias."""
    return bias.meta.get(_OWNER)
