"""The record that goes from pass to pass: an unlifted ATen graph and typed tables beside it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node
from torch.fx.node import map_aggregate

from fptq_compiler.graph import evaluate
from fptq_compiler.graph.sites import Sites
from fptq_compiler.graph.stored import hold
from fptq_compiler.source_line import model_frame
from fptq_compiler.transforms import Map


@dataclass(frozen=True)
class InputSpec:
    """One model input: its name, dtype and dimensions (an int, or a symbol's name)."""

    name: str
    dtype: torch.dtype
    dims: tuple[int | str, ...]


@dataclass(frozen=True)
class NearMiss:
    """Something that was almost a site: where, why not, and the user's source line."""

    what: str
    node: str
    reason: str
    source: str = ""

    def __str__(self) -> str:
        where = f" ({self.source})" if self.source else ""
        return f"{self.what} at {self.node}: {self.reason}{where}"


@dataclass(frozen=True)
class ActivationQuantizer:
    """A static activation quantiser: its module, its node in the graph, and its readers.

    `stored` says of keys and values that a cache will hold their codes.
    """

    module: str
    node: str
    readers: tuple[str, ...]
    role: str  # "linear input" | "head input" | "key" | "value"
    bits: int
    stored: bool = False


@dataclass(frozen=True)
class WeightQuantizer:
    """A weight quantiser: the parameter, its module, bits, and the block of inputs (0: none)."""

    parameter: str
    module: str
    bits: int
    block: int
    role: str  # "linear" | "head" | "embedding"


@dataclass
class Program:
    """A captured model on its way to ONNX.

    Attributes:
        module: unlifted graph with real parameters under their checkpoint names.
        inputs: the placeholders, in order.
        outputs: names of what the graph gives, the logits first.
        facts: what has been established (passes require and provide these words).
        sites: where transforms may act; filled by the pass find_sites.
        near_misses: the closest candidates of what was not found.
        maps: inserted transforms by name, for example `value.model.layers.0.self_attn`.
        scaled: whether the residual path carries S_n.
        activation_quantizers, weight_quantizers: what place_quantizers put in.
        decisions: what the compiler decided, in words, for the report.
        device: where the parameters are.
    """

    module: fx.GraphModule
    inputs: tuple[InputSpec, ...]
    outputs: tuple[str, ...] = ("logits",)
    facts: set[str] = field(default_factory=set)
    sites: Sites = field(default_factory=Sites)
    near_misses: list[NearMiss] = field(default_factory=list)
    maps: dict[str, Map] = field(default_factory=dict)
    scaled: bool = False
    activation_quantizers: list[ActivationQuantizer] = field(default_factory=list)
    weight_quantizers: list[WeightQuantizer] = field(default_factory=list)
    decisions: list[str] = field(default_factory=list)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def graph(self) -> fx.Graph:
        """The module's graph."""
        return self.module.graph

    def node(self, name: str) -> Node:
        """The node of that name; raises KeyError."""
        for node in self.graph.nodes:
            if node.name == name:
                found: Node = node
                return found
        raise KeyError(name)

    def parameter(self, name: str) -> Tensor:
        """The parameter or buffer of that checkpoint name, with its values."""
        found = evaluate.attribute(self.module, name)
        assert isinstance(found, Tensor)
        return found

    def held(self, name: str) -> Tensor:
        """The same as it stands in the module: for its shape, dtype and `stored.identity`."""
        found = evaluate.held(self.module, name)
        assert isinstance(found, Tensor)
        return found

    def copy(self) -> Program:
        """A record of its own; parameters and maps are shared until a pass replaces them."""
        module = fx.GraphModule(self.module, copy.deepcopy(self.graph))
        tables = {
            f.name: copy.copy(getattr(self, f.name)) for f in fields(self) if f.name != "module"
        }
        return Program(module, **tables)

    def run(self, ids: Tensor) -> Tensor:
        """Logits (B, S, V) of token ids (B, S); further inputs take their plain values."""
        with torch.no_grad():
            return evaluate.logits(self.module, self.arguments(ids))

    def arguments(self, ids: Tensor) -> list[Tensor]:
        """All inputs of the graph for token ids (B, S); a cache is empty."""
        plain = evaluate.default_inputs(self.module, ids.shape[0], ids.shape[1])
        values = list(plain.values())
        values[self.ids_index] = ids
        return [v.to(self.device) for v in values]

    def move(self, device: str | torch.device) -> None:
        """Take the parameters, and every device that the graph names, to `device`.

        On another device than before they are held in its memory, also those from files.
        """
        target = torch.device(device)
        if target == self.device:
            return
        hold(self.module)

        def moved(value: Any) -> Any:
            return target if isinstance(value, torch.device) else value

        self.module.to(target)
        for node in self.graph.nodes:
            node.args = map_aggregate(node.args, moved)
            node.kwargs = map_aggregate(node.kwargs, moved)
        self.module.recompile()
        self.device = target

    @property
    def ids_index(self) -> int:
        """Which input holds the token ids."""
        for index, spec in enumerate(self.inputs):
            if spec.name == "input_ids":
                return index
        integers = [i for i, s in enumerate(self.inputs) if not s.dtype.is_floating_point]
        return integers[0] if integers else 0

    def call_nodes(self, target: object) -> list[Node]:
        """All calls of `target`, in graph order."""
        return [n for n in self.graph.nodes if n.op == "call_function" and n.target is target]


def source_line(node: Node) -> str:
    """The innermost line of the user's model code that made the node, or an empty string."""
    return model_frame(node.meta.get("stack_trace") or "")
