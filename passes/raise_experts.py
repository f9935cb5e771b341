"""Give every expert of a mixture linears of its own.

    before  one operator over all experts' weights (E, out, in), on tokens sorted or gathered by
            the expert that the router chose
    after   y = Σ_e r_e(x) F_e(x),  r (T, E) the router's weights, 0 where it did not choose e

Linears of their own are what transforms, ranges and quantisers are made for. Each expert then
sees every token, which costs E / k times the products of the k that were chosen; no operator of
ONNX multiplies INT4 experts of chosen tokens with static activations.
The rewrite is kept where both forms give the same on random tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from fptq_compiler.graph.evaluate import Region, ancestors
from fptq_compiler.graph.inputs import input_nodes
from fptq_compiler.graph.pipeline import Pass, PassResult
from fptq_compiler.graph.probe import EXACT, between
from fptq_compiler.graph.program import NearMiss, Program, source_line
from fptq_compiler.graph.surgery import call, get_parameter, record, replace, set_parameter
from fptq_compiler.passes.canonicalize import CASTS

aten = torch.ops.aten
GROUPED = ("transformers.grouped_mm_fallback.default", "aten._grouped_mm.default")
BATCHED = (aten.bmm.default, aten.matmul.default)
SELECTIONS = (aten.index.Tensor, aten.index_select.default, aten.repeat_interleave.self_int)


class RaiseExperts(Pass):
    """Replace every mixture whose experts share one parameter; others have linears already."""

    requires = ("canonical",)
    provides = ("experts_raised",)

    def run(self, program: Program) -> PassResult:
        """Rewrite mixture by mixture, each proved before it is kept."""
        changed, misses = 0, []
        for router in program.call_nodes(aten.topk.default):
            try:
                mixture = _mixture(program, router)
                if mixture is not None:
                    _rewrite(program, mixture)
                    changed += 1
            except _OtherMixtureError as other:
                node, reason = other.node, str(other)
                misses.append(NearMiss("experts", node.name, reason, source_line(node)))
        return PassResult(changed, tuple(misses))


class _OtherMixtureError(Exception):
    """Experts that are chosen or combined in a way that is not known; carries the node."""

    def __init__(self, reason: str, node: Node) -> None:
        super().__init__(reason)
        self.node = node


@dataclass(frozen=True)
class _Product:
    """Rows times the weight of the expert that each belongs to.

    Attributes:
        rows: (S, in).
        result: (S, out).
        weights: the node of all experts' weights.
        transposed: whether these are (E, in, out), not (E, out, in).
    """

    rows: Node
    result: Node
    weights: Node
    transposed: bool


@dataclass(frozen=True)
class _Mixture:
    """Tokens (T, d) in, `result` (T, d) out; experts `chosen` (T, k) with weights `shares`."""

    tokens: Node
    chosen: Node
    shares: Node
    up: _Product
    down: _Product
    result: Node


def _mixture(program: Program, router: Node) -> _Mixture | None:
    products = [p for n in _behind(router) if (p := _product(n)) is not None]
    if not products:
        return None
    if len(products) != 2:
        reason = f"{len(products)} products with chosen experts, expected two: up and down"
        raise _OtherMixtureError(reason, products[0].result)
    up, down = products
    tokens = _tokens(up.rows)
    width = router.args[1]
    chosen = next((r for r in router.users if r.args[1] == 1), None)
    result = _combined(down.result, tokens)
    shares = _shares(router, down.result, result, width)
    if chosen is None:
        reason = "the router's choice is not read"
        raise _OtherMixtureError(reason, router)
    return _Mixture(tokens, chosen, shares, up, down, result)


def _behind(source: Node) -> list[Node]:
    """All that is computed from `source`, in the order of the graph."""
    reached = {source}
    for node in source.graph.nodes:
        if not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    later = [n for n in source.graph.nodes if n in reached]
    other = next((n for n in later[1:] if n.target is aten.topk.default), None)
    return later[: later.index(other)] if other is not None else later


def _product(node: Node) -> _Product | None:
    if str(node.target) in GROUPED:
        rows, weights = input_nodes(node, 2)
        transposed = True
        while weights.target is aten.transpose.int:
            weights, transposed = weights.all_input_nodes[0], not transposed
        return _Product(rows, node, weights, transposed) if weights.op == "get_attr" else None
    if node.target not in BATCHED or len(node.users) != 1:
        return None
    left, right = node.all_input_nodes
    (result,) = node.users
    for selected, rows, transposed in ((left, right, False), (right, left, True)):
        source = selected.args[0] if selected.target is aten.index.Tensor else None
        single = rows.target is aten.unsqueeze.default and result.target is aten.squeeze.dim
        if single and isinstance(source, Node) and source.op == "get_attr":
            return _Product(rows.all_input_nodes[0], result, source, transposed)
    return None


def _tokens(rows: Node) -> Node:
    """What the rows were selected from."""
    node = rows
    while node.target in CASTS:
        node = node.all_input_nodes[0]
    if node.target not in SELECTIONS:
        reason = f"{node.name} ({node.target}) feeds the experts, expected a selection of tokens"
        raise _OtherMixtureError(reason, node)
    return node.all_input_nodes[0]


def _combined(result: Node, tokens: Node) -> Node:
    """The sum over a token's experts: the first value behind them with a row for each token."""
    shape = str(tuple(tokens.meta["val"].shape))
    node = result
    while len(node.users) == 1:
        node = next(iter(node.users))
        if str(tuple(node.meta["val"].shape)) == shape:
            return node
    reason = f"what the experts give ({node.name}) is not summed into a row for each token"
    raise _OtherMixtureError(reason, node)


def _shares(router: Node, first: Node, last: Node, width: object) -> Node:
    """The weights (T, k) that the experts' results are multiplied by."""
    path = {first} | between(first, last)
    sides = {x for n in path for x in n.all_input_nodes if x not in path}
    behind = {n for side in sides for n in ancestors(side, (router,))}
    found: list[Node] = [
        n for n in router.graph.nodes
        if n in behind and isinstance(n.meta.get("val"), Tensor)
        and n.meta["val"].is_floating_point() and n.meta["val"].dim() == 2
        and n.meta["val"].shape[-1] == width
    ]
    if not found:
        reason = "the experts are not weighted by the router"
        raise _OtherMixtureError(reason, first)
    return found[-1]


def _rewrite(program: Program, mixture: _Mixture) -> None:
    """Build the sum over experts in front of the old one, prove it, and put it in its place."""
    up = _stored(program, mixture.up, mixture.result)
    down = _stored(program, mixture.down, mixture.result)
    region = between(mixture.up.result, mixture.down.rows)
    middle = [n for n in program.graph.nodes if n in region]
    strangers = {x for n in middle for x in n.all_input_nodes} - region - {mixture.up.result}
    if any(x.op != "get_attr" for x in strangers):
        reason = "between an expert's linears stands more than its activation"
        raise _OtherMixtureError(reason, middle[0])
    before = mixture.result
    routing = _routing(mixture, len(up))
    total: Node | None = None
    for expert, (first, second) in enumerate(zip(up, down, strict=True)):
        hidden = _linear(before, mixture.tokens, first)
        out = _linear(before, _copied(middle, {mixture.up.result: hidden}, before), second)
        share = call(before.graph, before, aten.slice.Tensor, (routing, 1, expert, expert + 1),
                     like=None)
        weighted = call(before.graph, before, aten.mul.Tensor, (out, record(share)), like=out)
        total = weighted if total is None else call(
            before.graph, before, aten.add.Tensor, (total, weighted), like=out
        )
    assert total is not None
    if not _equal(program, mixture, total):
        reason = "the experts computed one by one give something else"
        raise _OtherMixtureError(reason, mixture.result)
    replace(mixture.result, total)


def _copied(nodes: Sequence[Node], values: dict[Node, Node], before: Node) -> Node:
    """The last of `nodes` copied in front of `before`, on `values` in place of what they read."""
    (found,) = values.values()
    for node in nodes:
        with before.graph.inserting_before(before):
            found = before.graph.node_copy(node, lambda n: values.get(n, n))
        values[node] = record(found)
    return found


def _stored(program: Program, product: _Product, before: Node) -> list[Node]:
    """`get_attr` nodes of each expert's weight (out, in), views of what was one parameter."""
    name = str(product.weights.target)
    folder, _, last = name.rpartition(".")
    found = []
    for expert, weight in enumerate(program.parameter(name)):
        own = f"{folder}.{expert}.{last.removesuffix('.weight')}.weight"
        value = weight.mT if product.transposed else weight
        set_parameter(program.module, own, value)
        found.append(get_parameter(program.graph, before, own, value))
    return found


def _routing(mixture: _Mixture, experts: int) -> Node:
    """(T, E): the share of each expert in each token."""
    before = mixture.result

    def emit(target: Callable[..., object], *args: object) -> Node:
        return record(call(before.graph, before, target, args, like=None))

    numbers = emit(aten.arange.default, experts)
    equal = emit(aten.eq.Tensor, emit(aten.unsqueeze.default, mixture.chosen, -1), numbers)
    kind = mixture.shares.meta["val"].dtype
    wide = emit(aten.unsqueeze.default, mixture.shares, -1)
    return emit(
        aten.sum.dim_IntList, emit(aten.mul.Tensor, emit(aten.to.dtype, equal, kind), wide), [1]
    )


def _linear(before: Node, rows: Node, weight: Node) -> Node:
    made = call(before.graph, before, aten.linear.default, (rows, weight), like=rows)
    value = rows.meta["val"]
    made.meta["val"] = value.new_empty((*value.shape[:-1], weight.meta["val"].shape[0]))
    return made


def _equal(program: Program, mixture: _Mixture, total: Node) -> bool:
    region = Region(program.module, 2, 5)
    generator = torch.Generator().manual_seed(17)
    tokens = torch.randn(
        region.shape(mixture.tokens), generator=generator, dtype=torch.float64
    )
    old, new = (region.value(n, {mixture.tokens: tokens}) for n in (mixture.result, total))
    return bool((old - new).abs().max() <= EXACT * old.abs().max())

