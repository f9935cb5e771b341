"""Free the sizes of a graph: batch and sequence become symbols, and what was fixed follows.

Every recorded value is made anew by running the graph on fake tensors. Where the export had
written a size as a number and it is now a symbol, these follow it: the sizes of views and
expands, the ends of slices, and operands that hold more columns than the keys now have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.utils._sympy.value_ranges import ValueRanges

from fptq_compiler.errors import UnsupportedModelError
from fptq_compiler.graph.evaluate import Environment, attribute, run_node
from fptq_compiler.graph.program import source_line
from fptq_compiler.graph.surgery import call

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
END = 2**63 - 1
HINTS = (17, 101)  # sizes that torch imagines; no dimension of a model is likely to be one


def free_sizes(module: GraphModule, ids: Node, longest: int | None) -> None:
    """Make token ids (B, S) of any size, S at most `longest`, and record all values again.

    Args:
        module: a functional graph whose only input is `ids`; rewritten in place.
        ids: its placeholder.
        longest: tokens; None without a bound.

    Raises:
        UnsupportedModelError: naming a node that cannot have another size.
    """
    _Resizing(module, ids, longest).run()


@dataclass(frozen=True)
class _Change:
    """The sizes of one value, before and now; a symbol of before is its name."""

    before: tuple[int | str, ...]
    now: tuple[Any, ...]

    def freed(self, axis: int) -> bool:
        """Whether the axis was a number and is a symbol."""
        return isinstance(self.before[axis], int) and isinstance(self.now[axis], torch.SymInt)


class _Resizing:
    def __init__(self, module: GraphModule, ids: Node, longest: int | None) -> None:
        self._module, self._ids = module, ids
        self._before = {
            n: _dims(n.meta["val"]) for n in module.graph.nodes
            if isinstance(n.meta.get("val"), Tensor)
        }
        self._mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        self._longest = longest
        self._values: Environment = {ids: _symbolic(self._mode, ids.meta["val"].dtype, longest)}
        ids.meta["val"] = self._values[ids]
        with module.graph.inserting_after(ids):
            sizes = [
                module.graph.call_function(aten.sym_size.int, (ids, axis)) for axis in (1, 0)
            ]
        self._names = {ids.meta["val"].shape[axis].node.expr: node
                       for axis, node in zip((1, 0), sizes, strict=True)}

    def run(self) -> None:
        for node in list(self._module.graph.nodes):
            if node.op == "get_attr":
                found = attribute(self._module, str(node.target))
                if isinstance(found, Tensor):
                    node.meta["val"] = self._mode.from_tensor(found, static_shapes=True)
                    self._values[node] = node.meta["val"]
            elif node.op == "call_function":
                self._follow(node)
                self._record(node)
        self._bound()
        self._module.recompile()

    def _bound(self) -> None:
        """Note how many tokens there may be, for `evaluate.longest_sequence`."""
        size = self._ids.meta["val"].shape[1]
        if size.node.expr.is_Integer:
            self._refuse(self._ids, ValueError(f"the sequence became {size}"))
        if self._longest is not None:
            environment = size.node.shape_env
            environment.var_to_range[size.node.expr] = ValueRanges(2, self._longest)

    def _record(self, node: Node) -> None:
        try:
            with self._mode:
                value = run_node(self._module, node, self._values, None)
        except Exception as error:  # whatever the operator's shape function raises
            self._refuse(node, error)
        self._values[node] = node.meta["val"] = value
        if type(value) is int:
            _put_literal(node, value)
        elif isinstance(value, torch.SymInt):
            name = self._names.get(value.node.expr)
            if value.node.expr.is_Integer:
                _put_literal(node, int(value))
            elif name is not None and name is not node:
                node.replace_all_uses_with(name)

    def _refuse(self, node: Node, error: Exception) -> None:
        source = source_line(node)
        message = (
            f"node {node.name} ({node.target}) cannot follow a free batch and sequence: "
            f"{str(error).strip()[:300]}{f' ({source})' if source else ''}. Export the model "
            "with dynamic batch and sequence dimensions and without a cache."
        )
        raise UnsupportedModelError(message) from error

    def _follow(self, node: Node) -> None:
        """Literal sizes among the arguments of `node` follow what they were read off."""
        if node.target in VIEWS:
            self._follow_view(node)
        elif node.target is aten.expand.default:
            self._follow_expand(node)
        elif node.target is aten.slice.Tensor:
            self._follow_slice(node)
        elif node.target is SDPA:
            self._cut_mask(node)
        elif torch.Tag.pointwise in getattr(node.target, "tags", ()):
            self._cut_operands(node)

    def _change(self, node: Any) -> _Change | None:
        value = self._values.get(node) if isinstance(node, Node) else None
        if not isinstance(value, Tensor) or node not in self._before:
            return None
        return _Change(self._before[node], tuple(value.shape))

    def _follow_view(self, node: Node) -> None:
        """An axis that a view keeps, counted from the front or the back, keeps its size."""
        change = self._change(node.args[0])
        sizes = node.args[1]
        assert isinstance(sizes, (list, tuple))
        if change is None:
            return
        kept = _kept_axes(change.before, self._before[node])
        node.target = aten.reshape.default  # what is viewed may lie in memory otherwise now
        node.args = (node.args[0], [
            self._names.get(change.now[kept[axis]].node.expr, size)
            if isinstance(size, int) and size >= 0 and axis in kept and change.freed(kept[axis])
            else size
            for axis, size in enumerate(sizes)
        ])

    def _follow_expand(self, node: Node) -> None:
        change = self._change(node.args[0])
        sizes = node.args[1]
        assert isinstance(sizes, (list, tuple))
        if change is None:
            return
        new = len(sizes) - len(change.now)
        node.args = (node.args[0], [
            -1 if axis >= new and change.freed(axis - new) and size == change.before[axis - new]
            else size
            for axis, size in enumerate(sizes)
        ])

    def _follow_slice(self, node: Node) -> None:
        """A slice to the end of an axis stays one."""
        change = self._change(node.args[0])
        if change is None or len(node.args) < 4:
            return
        source, axis, start, end = node.args[:4]
        assert isinstance(axis, int)
        size = change.before[axis]
        whole = isinstance(end, int) and isinstance(size, int) and end >= size
        if whole and change.freed(axis):
            node.args = (source, axis, start, END, *node.args[4:])

    def _cut_mask(self, node: Node) -> None:
        keys = self._change(node.args[1])
        mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        shown = self._change(mask)
        if keys is None or shown is None or not isinstance(mask, Node):
            return
        wider = isinstance(shown.now[-1], int) and shown.now[-1] != 1
        if wider and isinstance(keys.now[-2], torch.SymInt):
            node.replace_input_with(mask, self._cut(node, mask, keys.now[-2]))

    def _cut_operands(self, node: Node) -> None:
        """An operand keeps as many columns as the others now have."""
        operands = [(x, c) for x in node.all_input_nodes if (c := self._change(x)) and c.now]
        freed = [c for _, c in operands if c.freed(-1)]
        for operand, change in operands:
            if freed and not change.freed(-1) and change.now[-1] == freed[0].before[-1] != 1:
                node.replace_input_with(operand, self._cut(node, operand, freed[0].now[-1]))

    def _cut(self, before: Node, operand: Node, size: torch.SymInt) -> Node:
        """The first columns of an operand."""
        axis = self._values[operand].dim() - 1
        end = self._names[size.node.expr]
        cut = call(before.graph, before, aten.slice.Tensor, (operand, axis, 0, end), like=operand)
        self._record(cut)
        return cut


def _dims(value: Tensor) -> tuple[int | str, ...]:
    return tuple(int(d) if isinstance(d, int) else str(d) for d in value.shape)


def _symbolic(mode: FakeTensorMode, dtype: torch.dtype, longest: int | None) -> Tensor:
    """Fake token ids (B, S)."""
    rows, columns = HINTS
    context: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(
        dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.DYNAMIC]
    )
    # Below the bound, or what is cut to the tokens that there are would seem to be whole.
    columns = min(columns, max(2, longest - 1)) if longest is not None else columns
    return mode.from_tensor(
        torch.zeros((rows, columns), dtype=dtype), symbolic_context=context
    )


def _put_literal(node: Node, value: int) -> None:
    """Every reader of a size reads a number."""
    for reader in list(node.users):
        reader.args = torch.fx.map_arg(reader.args, lambda n: value if n is node else n)
        reader.kwargs = torch.fx.map_arg(reader.kwargs, lambda n: value if n is node else n)


def _kept_axes(before: Sequence[int | str], after: Sequence[int | str]) -> dict[int, int]:
    """Axis after: axis before, of the axes that a view keeps, by their sizes; the front first."""
    kept = {}
    for axis, (old, new) in enumerate(zip(reversed(before), reversed(after), strict=False), 1):
        if old != new:
            break
        kept[len(after) - axis] = len(before) - axis
    for axis, (old, new) in enumerate(zip(before, after, strict=False)):
        if old != new:
            break
        kept[axis] = axis
    return kept
