"""Raise every spelling of attention to `fptq.attention(q, k, v, mask, causal, scale)`.

Matched: `scaled_dot_product_attention`, and softmax between two matmuls with the scale on the
scores and the mask added, filled or selected. Grouped queries are recognised by evaluating
what stands between the operand and the smaller tensor it repeats, so that expand,
repeat_interleave and enable_gqa are one. A mask that hides exactly the future, at every size
that can show a difference, becomes the flag `causal`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fptq_compiler.graph import ops
from fptq_compiler.graph.evaluate import Region, ancestors, longest_sequence
from fptq_compiler.graph.patterns import (
    Alt,
    Commutes,
    Match,
    Maybe,
    NoMatch,
    Op,
    Pattern,
    Var,
    deepest,
    match,
)
from fptq_compiler.graph.pipeline import Pass, PassResult
from fptq_compiler.graph.probe import Probe
from fptq_compiler.graph.program import NearMiss, Program, source_line
from fptq_compiler.graph.surgery import call, replace
from fptq_compiler.passes.canonicalize import CASTS

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
SOFTMAX = (aten.softmax.int, aten._softmax.default)
MATMUL = (aten.matmul.default, aten.bmm.default)
ADD = (aten.add.Tensor,)
PASSING = (*CASTS, aten.expand.default)

PRODUCT = Op(MATMUL, (Var("q"), Var("k_transposed")))
SCALED: Pattern = Alt(
    (
        Op((aten.mul.Tensor, aten.mul.Scalar), (PRODUCT, Var("factor"))),
        Op((aten.div.Tensor, aten.div.Scalar), (PRODUCT, Var("divisor"))),
        PRODUCT,
    )
)
MASKED: Pattern = Alt(
    (
        Commutes(ADD, Maybe(CASTS, SCALED), Var("mask")),
        Op((aten.masked_fill.Scalar, aten.masked_fill.Tensor),
           (Maybe(CASTS, SCALED), Var("hidden"), Var("fill"))),
        Op((aten.where.self, aten.where.ScalarOther),
           (Var("shown"), Maybe(CASTS, SCALED), Var("fill"))),
        SCALED,
    )
)
PROBABILITIES = Maybe(CASTS, Op(SOFTMAX, (Maybe(CASTS, MASKED), Var("axis"))))
ATTENTION = Op(MATMUL, (PROBABILITIES, Var("v")))
LONGEST_MASK = 8192
LONGEST_RUN = 2 * LONGEST_MASK + 3


class RaiseAttention(Pass):
    """Replace attention cores by the composite operator, with ungrouped keys and values."""

    requires = ("canonical",)
    provides = ("attention_raised",)

    def run(self, program: Program) -> PassResult:
        """Raise all cores; report softmaxes that belong to none."""
        changed = 0
        raised_softmax: set[Node] = set()
        misses: list[NearMiss] = []
        masks = _Masks(program)
        for node in list(program.graph.nodes):
            if node.target is SDPA:
                _raise_sdpa(program, node, masks)
                changed += 1
            elif node.target in MATMUL:
                found = match(ATTENTION, node)
                if isinstance(found, Match):
                    reason = _raise_spelling(program, node, found, masks)
                    raised_softmax.update(n for n in found.nodes if n.target in SOFTMAX)
                    if reason:
                        misses.append(
                            NearMiss("attention", node.name, reason, source_line(node))
                        )
                    else:
                        changed += 1
        for node in program.graph.nodes:
            if node.target in SOFTMAX and node.users and node not in raised_softmax:
                misses.append(NearMiss("attention", node.name, _reason(node), source_line(node)))
        return PassResult(changed, tuple(misses))


def _raise_sdpa(program: Program, node: Node, masks: _Masks) -> None:
    names = ("q", "k", "v", "mask", "dropout", "causal")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False))
    given |= {{"attn_mask": "mask", "is_causal": "causal"}.get(k, k): v
              for k, v in node.kwargs.items()}
    q, k, v = given["q"], given["k"], given["v"]
    width = q.meta["val"].shape[-1]
    scale = given.get("scale")
    scale = 1.0 / math.sqrt(width) if scale is None else scale
    _emit(program, node, q, k, v, given.get("mask"), bool(given.get("causal", False)),
          float(scale), masks)


def _raise_spelling(program: Program, node: Node, found: Match, masks: _Masks) -> str:
    """Raise a matmul-softmax-matmul; the answer is empty, or why it was left alone."""
    q, kt, v = found["q"], found["k_transposed"], found["v"]
    bindings = found.bindings
    if q.meta["val"].dim() != 4 or v.meta["val"].dim() != 4:
        return f"the operands have rank {q.meta['val'].dim()}, expected (B, H, S, D)"
    if bindings["axis"] not in (-1, 3):
        return f"softmax over axis {bindings['axis']}, expected the last"
    scale = bindings.get("factor", 1.0)
    if "divisor" in bindings:
        divisor = bindings["divisor"]
        scale = 1.0 / divisor if isinstance(divisor, (int, float)) else divisor
    if not isinstance(scale, (int, float)):
        return "the scores are scaled by a tensor, expected a literal"
    fill = bindings.get("fill", float("-inf"))
    if not isinstance(fill, (int, float)) or fill > -1e4:
        return f"masked scores are set to {fill}, expected minus infinity"
    mask = bindings.get("mask")
    if "shown" in bindings:
        mask = bindings["shown"]
    if "hidden" in bindings:
        hidden = bindings["hidden"]
        mask = call(program.graph, node, aten.logical_not.default, (hidden,), like=hidden)
    k = _transposed(node, kt)
    _emit(program, node, q, k, v, mask, False, float(scale), masks)
    return ""


def _transposed(before: Node, kt: Node) -> Node:
    """The keys (B, H, T, D) whose transpose is `kt` (B, H, D, T)."""
    if kt.target is aten.transpose.int:
        axes = {a % 4 for a in kt.args[1:3] if isinstance(a, int)}
        if axes == {2, 3}:
            source = kt.args[0]
            assert isinstance(source, Node)
            return source
    k = call(kt.graph, before, aten.transpose.int, (kt, 2, 3), like=None)
    k.meta["val"] = kt.meta["val"].transpose(2, 3)
    return k


def _emit(
    program: Program,
    node: Node,
    q: Node,
    k: Node,
    v: Node,
    mask: Any,
    causal: bool,
    scale: float,
    masks: _Masks,
) -> None:
    fewer = _ungroup(masks.probe, k), _ungroup(masks.probe, v)
    if len({masks.probe.region.shape(x)[1] for x in fewer}) == 1:
        k, v = fewer
    if isinstance(mask, Node) and masks.is_causal(mask):
        mask, causal = None, True
    arguments = (q, k, v, mask, causal, scale)
    replace(node, call(program.graph, node, ops.attention, arguments, like=node))


def _ungroup(probe: Probe, operand: Node) -> Node:
    """The earliest tensor with fewer heads that `operand` merely repeats, or itself."""
    best = operand
    current = operand
    while current.op == "call_function" and current.args and isinstance(current.args[0], Node):
        current = current.args[0]
        value = current.meta.get("val")
        if not isinstance(value, Tensor) or current.target is aten.linear.default:
            break
        same_rank = value.dim() == 4 and value.shape[-1] == operand.meta["val"].shape[-1]
        if not same_rank:
            continue
        heads, fewer = probe.region.shape(operand)[1], probe.region.shape(current)[1]
        if fewer >= heads or heads % fewer:
            continue
        if not probe.repeats_heads(current, operand):
            break
        return current
    return best


class _Masks:
    """Answers, once for each mask, whether it hides exactly the future."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._answers: dict[Node, bool] = {}
        self.probe = Probe(program.module)

    def is_causal(self, mask: Node) -> bool:
        """Whether a query sees just the keys up to itself, at every size that can matter."""
        if mask not in self._answers:
            self._answers[mask] = self._evaluate(mask)
        return self._answers[mask]

    def _evaluate(self, mask: Node) -> bool:
        behind = ancestors(mask)
        size_only = (aten.sym_size.int, aten.new_ones.default, aten.new_zeros.default)
        for node in behind:
            if node.op != "placeholder" or "position" in node.name:
                continue
            if any(r in behind and r.target not in size_only for r in node.users):
                return False  # the mask depends on an input's values: it stays as it is
        if any("position" in n.name for n in behind if n.op == "placeholder"):
            return False
        window = max(
            (abs(a) for n in behind for a in n.args if isinstance(a, int) and abs(a) < 2**31),
            default=0,
        )
        if window > LONGEST_MASK:
            return False
        bound = longest_sequence(self._program.module)
        longest = min(bound or LONGEST_RUN, LONGEST_RUN)
        sizes = [(1, 1), (2, 7), (3, 13), (1, max(33, 2 * window + 3))]
        return all(self._hides_future(mask, b, min(s, longest)) for b, s in sizes)

    def _hides_future(self, mask: Node, batch: int, sequence: int) -> bool:
        found = Region(self._program.module, batch, sequence).value(mask, {})
        shown = found if found.dtype == torch.bool else found > -1e4
        if found.dtype != torch.bool and not bool((found[shown] == 0).all()):
            return False
        expected = ops.causal_mask(shown.shape[-2], shown.shape[-1], shown.device)
        return bool((shown == expected).all())


def _reason(node: Node) -> str:
    """The deepest failure among the matmuls behind a softmax."""
    failure = NoMatch("no matmul reads the softmax", node, 0)
    frontier: list[Node] = list(node.users)
    seen: set[Node] = set()
    while frontier:
        reader = frontier.pop()
        if reader in seen or len(seen) > 8:
            continue
        seen.add(reader)
        if reader.target in MATMUL:
            found = match(ATTENTION, reader)
            if isinstance(found, NoMatch):
                failure = deepest(failure, found)
        elif reader.target in PASSING:
            frontier.extend(reader.users)
    return failure.reason
