"""Raise every spelling of attention to `fptq.attention(q, k, v, mask, causal, scale, ...)`.

Anchored at scaled_dot_product_attention, or at a softmax between two products. What stands
between the products is read (attention_core), the axes are brought to (B, H, S, D)
(attention_axes), operands are taken from as far back as they are only moved, repeated for their
group or scaled (attention_operands), and a mask that hides exactly the future, or that and what
lies a window behind, becomes a flag (attention_masks). Every raise is proved by running both
forms on random operands before it is kept (attention_proof).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fptq_compiler.graph import ops
from fptq_compiler.graph.evaluate import ancestors
from fptq_compiler.graph.pipeline import Pass, PassResult
from fptq_compiler.graph.probe import Probe
from fptq_compiler.graph.program import NearMiss, Program, source_line
from fptq_compiler.graph.shaped import shaped_call
from fptq_compiler.graph.surgery import replace
from fptq_compiler.passes.attention_axes import Axes, NoAxesError
from fptq_compiler.passes.attention_core import (
    SOFTMAX,
    Mask,
    NoCoreError,
    attends,
    read_core,
    refuse,
)
from fptq_compiler.passes.attention_masks import Masks
from fptq_compiler.passes.attention_operands import (
    common_repeat,
    every,
    linears,
    source_of,
)
from fptq_compiler.passes.attention_proof import EXACT, AttentionProof

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default


class RaiseAttention(Pass):
    """Replace attention cores by the composite operator, with ungrouped keys and values."""

    requires = ("canonical",)
    provides = ("attention_raised",)

    def run(self, program: Program) -> PassResult:
        """Raise all cores; report softmaxes that look like one and are not."""
        changed = 0
        misses: list[NearMiss] = []
        raising = _Raising(program)
        for node in list(program.graph.nodes):
            if node.target is not SDPA and not (node.target in SOFTMAX and attends(node)):
                continue
            try:
                found = _sdpa(node) if node.target is SDPA else raising.spelled(node)
                raising.raise_(found)
                changed += 1
            except (NoCoreError, NoAxesError) as error:
                where = error.node if isinstance(error, NoCoreError) else node
                misses.append(NearMiss("attention", where.name, str(error), source_line(where)))
        return PassResult(changed, tuple(misses))


@dataclass(frozen=True)
class _Found:
    """An attention as it stands in the graph.

    Attributes:
        node: its result.
        q, k, v: operands (..., S, D).
        lead: the leading sizes of the scores.
        queries: S.
        masks: in order.
        causal, scale, softcap: as in `fptq.attention`.
    """

    node: Node
    q: Node
    k: Node
    v: Node
    lead: tuple[Any, ...]
    queries: Any
    masks: tuple[Mask, ...]
    causal: bool
    scale: float
    softcap: float


def _sdpa(node: Node) -> _Found:
    """Torch's own operator."""
    names = ("q", "k", "v", "mask", "dropout", "causal")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False))
    given |= {{"attn_mask": "mask", "is_causal": "causal"}.get(k, k): v
              for k, v in node.kwargs.items()}
    q, mask, scale = given["q"], given.get("mask"), given.get("scale")
    *lead, queries, width = q.meta["val"].shape
    return _Found(
        node, q, given["k"], given["v"], tuple(lead), queries,
        (Mask(mask, node),) if isinstance(mask, Node) else (), bool(given.get("causal", False)),
        1.0 / math.sqrt(width) if scale is None else float(scale), 0.0,
    )


class _Raising:
    """Raises the attentions of one program."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._masks = Masks(program)
        self._probe = Probe(program.module)
        self._proof = AttentionProof(program.module)
        self._ids = program.node(program.inputs[program.ids_index].name)

    def spelled(self, softmax: Node) -> _Found:
        """What stands around a softmax.

        Raises:
            NoCoreError: it is no attention that can be raised.
        """
        core = read_core(self._probe.region, softmax)
        q, keys = core.product.args[-2:]
        v = core.mixing.args[1]
        assert isinstance(q, Node)
        assert isinstance(keys, Node)
        assert isinstance(v, Node)
        k = shaped_call(
            core.mixing.graph, core.mixing, aten.transpose.int, (keys, -2, -1), like=keys
        )
        *lead, queries, _ = core.scores.meta["val"].shape
        return _Found(
            core.mixing, q, k, v, tuple(lead), queries, tuple(core.masks), False, core.scale,
            core.softcap,
        )

    def raise_(self, found: _Found) -> None:
        """Put the composite operator in its place.

        Raises:
            NoAxesError: the operands are not those of attention.
            NoCoreError: the composite operator computes something else.
        """
        node, graph = found.node, found.node.graph
        batch = self._ids.meta["val"].shape[0]
        of_keys = found.k.meta["val"].shape[:-2]
        axes = Axes.of(node, found.lead, of_keys, batch, (self._ids,))
        width = found.q.meta["val"].shape[-1]
        q = axes.canonical(axes.reshaped(found.q, (*found.lead, found.queries, width)), found.lead)
        k, v = (axes.canonical(x, x.meta["val"].shape[:-2]) for x in (found.k, found.v))
        of_q, of_k, of_v = (source_of(self._probe, x) for x in (q, k, v))
        if of_k.heads == of_v.heads and of_v.factor == 1.0:
            k, v = of_k.made(node), of_v.made(node)
            scale = found.scale * of_k.factor
        else:
            scale = found.scale
        q, scale = of_q.made(node), scale * of_q.factor
        operands = [of_q.node, of_k.node, of_v.node]
        repeat = common_repeat(self._probe, (k, v))
        if repeat > 1:
            k, v = every(node, k, repeat), every(node, v, repeat)
        if repeat > 1 or not set(operands) <= set(ancestors(node)):
            operands = [linear for x in operands for linear in linears(x)]
        mask, causal, window, left = self._settings(found, axes)
        arguments: tuple[Any, ...] = (q, k, v, mask, causal, scale)
        if found.softcap or window:
            arguments = (*arguments, found.softcap, window)
        core = shaped_call(graph, node, ops.attention, arguments, like=node)
        back = axes.back(core, node.meta["val"].shape)
        error = self._proof.error(node, back, operands, left)
        if error > EXACT:
            refuse(
                "read as attention it computes something else, by a relative error of "
                f"{error:.1e}", node,
            )
        replace(node, back)

    def _settings(
        self, found: _Found, axes: Axes
    ) -> tuple[Node | None, bool, int, list[Node]]:
        """The mask that is left, the flags of the others, and where the mask begins."""
        causal, window = found.causal, 0
        left: list[tuple[Mask, Node]] = []
        for mask in found.masks:
            seen = self._masks.window(mask.node)
            if seen is None:
                left.append((mask, axes.mask(mask.node, mask.at)))
            else:
                causal = True
                window = min(window or seen, seen or window)
        moved = [node for _, node in left]
        if len({node.meta["val"].dtype == torch.bool for node in moved}) > 1:
            refuse("one mask is added, another hides", found.node)
        whole = moved[0] if moved else None
        for node in moved[1:]:
            both = aten.logical_and.default if node.meta["val"].dtype == torch.bool else (
                aten.add.Tensor
            )
            whole = shaped_call(node.graph, found.node, both, (whole, node), like=node)
        return whole, causal, window, [mask.source for mask, _ in left]
