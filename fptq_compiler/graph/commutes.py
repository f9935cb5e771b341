"""Ask one node whether it commutes with a map of the channels, by running it on random values.

A node's readers see what they saw before if its inputs are mapped and its output is mapped back.
Additions, products with a number, moves of tokens and norms without gain commute with every
orthogonal map; moves of tokens alone commute with a gain and a bias. No list of operators can
say so of all spellings, and one run of the node at a small size does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fptq_compiler.graph.evaluate import Region, attribute, run_node
from fptq_compiler.graph.probe import EXACT

ChannelMap = Callable[[Tensor], Tensor]
INTEGERS = (1, 0)  # a 0 that masks would make a zero of everything
SHOWN = 0.7  # the part of a mask that is true


class Answer(Enum):
    """What mapping some inputs does to a node's output."""

    MAPPED = auto()
    SAME = auto()
    OTHER = auto()


def reflection(width: int) -> ChannelMap:
    """An orthogonal map of the last axis that leaves no channel alone: x - 2 (x · v) v."""
    generator = torch.Generator().manual_seed(11)
    v = torch.randn(width, generator=generator, dtype=torch.float64)
    v /= v.norm()
    return lambda x: x - 2 * (x @ v).unsqueeze(-1) * v


def gain_and_bias(width: int) -> ChannelMap:
    """A gain and a bias for each channel of the last axis."""
    generator = torch.Generator().manual_seed(12)
    gain = torch.rand(width, generator=generator, dtype=torch.float64) + 0.5
    bias = torch.randn(width, generator=generator, dtype=torch.float64)
    return lambda x: x * gain + bias


class Commutes:
    """Answers for the nodes of one graph, at one small size."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        self._module = module
        self._region = Region(module, 2, 5)

    def width(self, node: Node) -> int | None:
        """The size of the last axis of a floating-point tensor; None for anything else."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() == 0:
            return None
        return self._region.sizes(value.shape[-1:])[0]

    def ask(self, node: Node, mapped: Collection[Node], change: ChannelMap) -> Answer:
        """What `change` of the inputs `mapped` does to the output of `node`.

        Other inputs keep their values: parameters as they are, floating-point values and
        booleans random, integers 1, or 0 where that is no index.
        """
        for integer in INTEGERS:
            plain = self._values(node, integer, mapped)
            changed = {x: change(v) if x in mapped else v for x, v in plain.items()}
            try:
                before, after = (
                    run_node(self._module, node, values, torch.float64)
                    for values in (plain, changed)
                )
            except (RuntimeError, IndexError, TypeError):
                continue
            pairs = zip(_tensors(before), _tensors(after), strict=True)
            answers = {_compare(b, a, change) for b, a in pairs}
            return answers.pop() if len(answers) == 1 else Answer.OTHER
        return Answer.OTHER

    def is_zero(self, node: Node) -> bool:
        """Whether a node gives zeros whatever it reads, as what sums are begun with."""
        for integer in INTEGERS:
            try:
                found = run_node(
                    self._module, node, self._values(node, integer), torch.float64
                )
            except (RuntimeError, IndexError, TypeError):
                continue
            return isinstance(found, Tensor) and not bool(found.any())
        return False

    def _values(
        self, node: Node, integer: int, parameters: Collection[Node] = ()
    ) -> dict[Node, Any]:
        """What a node reads, without the parameters but those named."""
        generator = torch.Generator().manual_seed(13)
        return {
            x: self._value(x, integer, generator)
            for x in node.all_input_nodes if x.op != "get_attr" or x in parameters
        }

    def _value(self, node: Node, integer: int, generator: torch.Generator) -> Any:
        if node.op == "get_attr":
            return attribute(self._module, str(node.target)).double()
        value = node.meta.get("val")
        if isinstance(value, (list, tuple)):
            return [self._filled(v, integer, generator) for v in value]
        if isinstance(value, Tensor):
            return self._filled(value, integer, generator)
        return self._region.value(node, {})

    def _filled(self, value: Tensor, integer: int, generator: torch.Generator) -> Tensor:
        shape = self._region.sizes(value.shape)
        if value.is_floating_point():
            return torch.randn(shape, generator=generator, dtype=torch.float64)
        if value.dtype == torch.bool:
            return torch.rand(shape, generator=generator) < SHOWN
        return torch.full(shape, integer, dtype=value.dtype)


def _tensors(value: Any) -> list[Tensor]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return [v for v in values if isinstance(v, Tensor)]


def _compare(before: Tensor, after: Tensor, change: ChannelMap) -> Answer:
    if not before.is_floating_point() or before.dim() == 0:
        return Answer.SAME if torch.equal(before, after) else Answer.OTHER
    limit = EXACT * float(before.abs().max().clamp_min(1e-30))
    if float((after - before).abs().max()) <= limit:
        return Answer.SAME
    try:
        expected = change(before)
    except RuntimeError:  # another number of channels
        return Answer.OTHER
    return Answer.MAPPED if float((after - expected).abs().max()) <= limit * 10 else Answer.OTHER
