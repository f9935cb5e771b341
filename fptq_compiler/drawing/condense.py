"""A program's graph becomes boxes and edges: moves and casts vanish, sites become single boxes.

Norms, linear layers, attention and additions are boxes of their own. What stands between an
attention's projections and its core belongs to the core, what stands between an MLP's
projections to one box. All other operators that touch the tokens' values are drawn too, those
next to each other as one box: pointwise ones as such, the rest as not recognised.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fptq_compiler.drawing.scene import Box
from fptq_compiler.graph import ops
from fptq_compiler.graph.probe import between
from fptq_compiler.graph.program import Program, source_line
from fptq_compiler.graph.sites import LinearRef
from fptq_compiler.passes.canonicalize import CASTS, COPIES
from fptq_compiler.passes.linears import MOVES, is_linear, weight_node
from fptq_compiler.source_line import SourceLine
from fptq_compiler.unrecognised import PRODUCTS, module_of

aten = torch.ops.aten
NORMS = (ops.rms_norm, aten.layer_norm.default, aten.group_norm.default)
VANISH = (
    *MOVES, *CASTS, *COPIES, aten.expand.default, aten.split_with_sizes.default,
    aten.split.Tensor, aten.chunk.default, aten.unbind.int, aten.repeat.default,
    aten.repeat_interleave.self_int, aten.index.Tensor, aten.cat.default, aten.stack.default,
)
MAKES_NEW = ("new_", "zeros_like", "ones_like", "full_like", "sym_size")
Edge = tuple[int, int]


class Condensed:
    """Boxes and edges of a program, with the nodes behind each box.

    Attributes:
        boxes: in the order of the graph.
        edges: from and to a box, by its place.
        nodes: the nodes of each box, the one that gives its value last.
    """

    def __init__(self, program: Program) -> None:
        """Condense a program whose sites are found and in which nothing is inserted yet."""
        self._program = program
        self._reasons = {m.node: m for m in program.near_misses}
        self._data = _touched(program)
        self._region = self._site_regions()
        self._masks = _mask_names(program)
        self._owner: dict[Node, int] = {}
        self.boxes: list[Box] = []
        self.nodes: list[list[Node]] = []
        self._group()
        self.boxes = [self._box(nodes) for nodes in self.nodes]
        self.edges = self._edges()

    def _site_regions(self) -> dict[Node, str]:
        """What lies inside of a site: `vanish`, or the name of the MLP that it belongs to."""
        nodes = {n.name: n for n in self._program.graph.nodes}
        found: dict[Node, str] = {}
        for core in self._program.call_nodes(ops.attention):
            for operand in core.args[:3]:
                if isinstance(operand, Node):
                    found |= dict.fromkeys(_behind(operand), "vanish")
        for site in self._program.sites.mlp:
            source = nodes[site.down.node].args[0]
            assert isinstance(source, Node)
            for ref in (site.up, site.gate):
                if ref is not None:
                    found |= dict.fromkeys(between(nodes[ref.node], source), site.name)
        return found

    def _kind(self, node: Node) -> str:
        """What a node is drawn as; empty where it vanishes, `loose` where it joins others."""
        if node.target is aten.embedding.default:
            return "embedding"
        if node.target in NORMS:
            return "norm"
        if is_linear(node):
            return "linear"
        if node.target is ops.attention:
            return "attention"
        region = self._region.get(node)
        if region is not None:
            return "" if region == "vanish" else "mlp"
        if node.target in VANISH or "getitem" in str(node.target):
            return ""
        operands = [x for x in node.args[:2] if isinstance(x, Node) and x in self._data]
        if node.target is aten.add.Tensor and len(operands) == 2:
            return "add"
        return "loose"

    def _group(self) -> None:
        """Give every node that does not vanish a box; loose neighbours share one.

        They do so at one level only, the number of other boxes before them, so that no path
        leaves a box and comes back.
        """
        levels: dict[Node, int] = {}
        mlp: dict[str, int] = {}
        for node in self._data:
            before = [x for x in node.all_input_nodes if x in self._data]
            kind = self._kind(node)
            level = max((levels[x] + self._counts(x) for x in before), default=0)
            levels[node] = level
            if not kind:
                continue
            joined = None
            if kind == "mlp":
                joined = mlp.get(self._region[node])
            elif kind == "loose":
                near = [self._owner[x] for x in self._sources(node)]
                joined = next((b for b in near if self._is_loose(b, levels, level)), None)
            if joined is None:
                joined = len(self.nodes)
                self.nodes.append([])
            if kind == "mlp":
                mlp[self._region[node]] = joined
            self._owner[node] = joined
            self.nodes[joined].append(node)

    def _counts(self, node: Node) -> bool:
        return self._kind(node) not in ("", "loose")

    def _is_loose(self, box: int, levels: dict[Node, int], level: int) -> bool:
        last = self.nodes[box][-1]
        return self._kind(last) == "loose" and levels[last] == level

    def _sources(self, node: Node) -> list[Node]:
        """The drawn nodes that a node reads, through those that vanish."""
        found: list[Node] = []
        frontier, seen = [x for x in node.all_input_nodes if x in self._data], set()
        while frontier:
            current = frontier.pop(0)
            if current in seen:
                continue
            seen.add(current)
            if current in self._owner:
                found.append(current)
            else:
                frontier.extend(x for x in current.all_input_nodes if x in self._data)
        return found

    def _edges(self) -> list[Edge]:
        found = {
            (self._owner[source], box)
            for box, nodes in enumerate(self.nodes)
            for node in nodes
            for source in self._sources(node)
            if self._owner[source] != box
        }
        return sorted(found)

    def _box(self, nodes: list[Node]) -> Box:
        first, last = nodes[0], nodes[-1]
        details = [("node", ", ".join(n.name for n in nodes[:4]) + ("…" if nodes[4:] else ""))]
        source = SourceLine.read(source_line(last))
        if source is not None:
            details.append(("written at", str(source)))
        details.append(("gives", _shape(last)))
        kind = self._kind(last)
        if kind == "linear":
            return self._linear(last, details)
        if kind == "embedding":
            table = weight_node(last)
            title = module_of(last).rpartition(".")[2] or "embedding"
            rows, width = table.meta["val"].shape
            details.insert(0, ("weight", str(table.target)))
            return Box("embedding", title, (f"{rows:,} × {width:,}",), (), tuple(details))
        if kind == "norm":
            return self._norm(last, details)
        if kind == "attention":
            return self._attention(last, details)
        if kind == "mlp":
            site = next(s for s in self._program.sites.mlp if s.name == self._region[last])
            words = f"{site.activation} × up" if site.gated else site.activation
            return Box("mlp", words, (f"width {site.width:,}",), (), tuple(details))
        if kind == "add":
            return Box("add", "+", (), (), tuple(details))
        return self._loose(nodes, first, details)

    def _linear(self, node: Node, details: list[tuple[str, str]]) -> Box:
        weight = weight_node(node)
        out, into = weight.meta["val"].shape
        parts = [f"{r} {ref.width:,}" for r, ref in self._parts(node)]
        lines = [f"{into:,} → {out:,}"]
        if len(parts) > 1:
            lines.append(" · ".join(parts))
        details.insert(0, ("weight", str(weight.target)))
        if len(node.args) > 2 and node.args[2] is not None:
            details.insert(1, ("bias", str(getattr(node.args[2], "target", ""))))
        return Box("linear", _name(str(weight.target)), tuple(lines), (), tuple(details))

    def _parts(self, node: Node) -> list[tuple[str, LinearRef]]:
        """The projections that one linear packs, with their roles."""
        found: list[tuple[str, LinearRef | None]] = []
        for site in self._program.sites.attention:
            found += [("q", site.q), ("k", site.k), ("v", site.v)]
        for mlp in self._program.sites.mlp:
            found += [("gate", mlp.gate), ("up", mlp.up)]
        return [(role, ref) for role, ref in found if ref is not None and ref.node == node.name]

    def _norm(self, node: Node, details: list[tuple[str, str]]) -> Box:
        words = "RMSNorm" if node.target is ops.rms_norm else str(node.target).split(".")[1]
        parameters = [x for x in node.args[1:] if isinstance(x, Node) and x.op == "get_attr"]
        gain = str(parameters[0].target) if parameters else ""
        if gain:
            details.insert(0, ("gain", gain))
        width = node.meta["val"].shape[-1]
        title = _name(gain) or module_of(node).rpartition(".")[2] or words
        return Box("norm", title, (f"{words} · {width}",), (), tuple(details))

    def _attention(self, node: Node, details: list[tuple[str, str]]) -> Box:
        site = next((s for s in self._program.sites.attention if s.core == node.name), None)
        lines = []
        if site is not None:
            lines.append(f"{site.heads} heads · {site.kv_heads} KV · {site.head_dim} channels")
            if site.rope is not None and site.rope.pairs:
                lines.append(f"RoPE {site.rope.style}")
            details.insert(0, ("site", site.name))
        mask, causal = node.args[3], node.args[4]
        softcap, window = (*node.args[6:8], 0.0, 0)[:2] if len(node.args) > 6 else (0.0, 0)
        seen = "causal" if causal else self._masks.get(mask, "no mask")
        lines.append(f"{seen}, window {window}" if window else seen)
        if softcap:
            lines.append(f"soft-capped at {softcap:g}")
        return Box("attention", "attention", tuple(lines), (), tuple(details))

    def _loose(self, nodes: list[Node], first: Node, details: list[tuple[str, str]]) -> Box:
        names = list(dict.fromkeys(_operator(n) for n in nodes))
        shown = ", ".join(names[:4]) + (" …" if names[4:] else "")
        misses = [self._reasons[n.name] for n in nodes if n.name in self._reasons]
        if not misses and all(_pointwise(n) for n in nodes):
            return Box("other", shown, (), (), tuple(details))
        if not misses and any(n.target is aten.topk.default for n in nodes):
            return Box("other", "router", (shown,), (), tuple(details))
        for miss in misses:
            details.append((f"no {miss.what}", miss.reason))
        if not misses:
            details.append(("why", "no pass knows these operators here"))
        return Box("unknown", "not recognised", (shown,), (), tuple(details))


def _touched(program: Program) -> dict[Node, None]:
    """The nodes that depend on embedded tokens, or on an input of floats, in order."""
    found: dict[Node, None] = {}
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder":
            if isinstance(value, Tensor) and value.is_floating_point() and "mask" not in node.name:
                found[node] = None
        elif node.op in ("call_function", "call_module"):
            embeds = node.target is aten.embedding.default
            reads = any(x in found for x in node.all_input_nodes)
            if (embeds or reads) and not any(word in str(node.target) for word in MAKES_NEW):
                found[node] = None
    return {n: None for n in found if n.op != "placeholder"}


def _behind(operand: Node) -> Iterable[Node]:
    """What stands between an attention's operand and the linears or norms before it."""
    stops = (*NORMS, *PRODUCTS, aten.linear.default, aten.embedding.default, ops.attention)
    frontier, seen = [operand], set()
    while frontier:
        node = frontier.pop()
        if node not in seen and node.target not in stops:
            seen.add(node)
            frontier.extend(node.all_input_nodes)
    return seen


def _mask_names(program: Program) -> dict[Any, str]:
    """What the masks are called: numbered, where several attentions share several of them."""
    masks = [core.args[3] for core in program.call_nodes(ops.attention)]
    kinds = list(dict.fromkeys(m for m in masks if isinstance(m, Node)))
    if len(kinds) < 2 or len(kinds) == len(masks):
        return dict.fromkeys(kinds, "mask")
    return {mask: f"mask {number}" for number, mask in enumerate(kinds, 1)}


def _pointwise(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and (
        torch.Tag.pointwise in node.target.tags
    )


def _operator(node: Node) -> str:
    words = str(node.target).split(".")
    return words[1] if words[0] == "aten" and len(words) > 1 else str(node.target)


def _name(parameter: str) -> str:
    """The last part of a module's path: `q_proj` of `model.layers.0.self_attn.q_proj.weight`."""
    parts = parameter.split(".")
    return parts[-2] if len(parts) > 1 else parameter


def _shape(node: Node) -> str:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return "several tensors"
    return "(" + ", ".join(str(size) for size in value.shape) + ")"
