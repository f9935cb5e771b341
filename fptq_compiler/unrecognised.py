"""The parts of a model that no pass understood, and what becomes of their weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch.fx import Node

from fptq_compiler.errors import UnsupportedModelError
from fptq_compiler.graph import ops
from fptq_compiler.graph.foreign import custom_operators
from fptq_compiler.graph.program import Program, source_line
from fptq_compiler.inspection import Unrecognised
from fptq_compiler.passes.linears import LINEAR, MOVES, nearest_linears, weight_node
from fptq_compiler.source_line import SourceLine

aten = torch.ops.aten
PRODUCTS = (
    aten.matmul.default, aten.mm.default, aten.bmm.default, aten.addmm.default,
    aten.baddbmm.default, aten.einsum.default, aten.convolution.default,
    aten.conv1d.default, aten.conv2d.default, aten._grouped_mm.default,
)
"""What multiplies by a weight and is no linear layer."""

ATTENTION_MEANING = (
    "computed in float as it is written; its linear layers are quantised, its keys and values "
    "are not, and no T_k and T_v"
)
LINEAR_MEANING = "quantised like the others, without a transform in front"
BLOCK_MEANING = "its linear layers are quantised, without T_k, T_v, T_u and T_d"
OPERATOR_MEANING = "the model cannot be compiled: ONNX has no form of it"
WEIGHT_MEANING = "stays float: only linear layers and embeddings are quantised"


def unrecognised(program: Program) -> list[Unrecognised]:
    """What FIND_SITES left: attention, blocks, linears in no site, float weights, operators."""
    return [
        *_attention(program), *_linears(program), *_float_weights(program),
        *_operators(program),
    ]


def refuse_unrecognised(names: Sequence[str], rows: Sequence[Unrecognised]) -> None:
    """Refuse a demand of transforms by name on a model that is not understood throughout.

    Raises:
        UnsupportedModelError: an attention or a whole block was not recognised.
    """
    unknown = [row for row in rows if row.kind in ("attention", "block")]
    if not names or not unknown:
        return
    places = ", ".join(dict.fromkeys(row.place for row in unknown))
    message = (
        f"the recipe demands {', '.join(names)}, expected a model that is recognised throughout, "
        f"and found parts that are not: {places}. Use --transforms auto to transform what is "
        "known and quantise the rest as it is"
    )
    raise UnsupportedModelError(
        message, [f"{row.kind} at {row.node}: {row.reason}{_where(row.source)}" for row in unknown]
    )


def module_of(node: Node) -> str:
    """The path of the module that made a node, as the exporter kept it; empty without one."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values()]
    return str(paths[-1]) if paths else ""


def _attention(program: Program) -> Iterator[Unrecognised]:
    nodes = {n.name: n for n in program.graph.nodes}
    for miss in program.near_misses:
        if miss.what == "attention":
            place = module_of(nodes[miss.node]) if miss.node in nodes else ""
            yield Unrecognised(
                "attention", place or miss.node, miss.node, miss.reason,
                SourceLine.read(miss.source), ATTENTION_MEANING,
            )


def _linears(program: Program) -> Iterator[Unrecognised]:
    """Linear layers in no site: a whole block of them, or some beside a site."""
    known = _known_linears(program)
    linears = program.call_nodes(LINEAR)
    inside = {_block(_weight(n)) for n in linears if n.name in known}
    left = [n for n in linears if n.name not in known]
    for (block, _), entries in groupby(left, lambda n: (_block(_weight(n)), _parent(_weight(n)))):
        group = list(entries)
        names = ", ".join(_weight(n).removesuffix(".weight").rpartition(".")[2] for n in group)
        alone = block not in inside
        yield Unrecognised(
            "block" if alone else "linear layers",
            block if alone else _parent(_weight(group[0])),
            group[0].name,
            f"{names}: neither attention nor an MLP reads or makes "
            f"{'it' if len(group) == 1 else 'them'}",
            SourceLine.read(source_line(group[0])),
            BLOCK_MEANING if alone else LINEAR_MEANING,
        )


def _float_weights(program: Program) -> Iterator[Unrecognised]:
    """Weights of products that are no linear layers: convolutions, einsum, experts in one."""
    for node in program.graph.nodes:
        if node.op != "get_attr":
            continue
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dim() < 2:
            continue
        product = _product_behind(node)
        if product is not None:
            name = str(node.target)
            yield Unrecognised(
                "weight", name, product.name,
                f"{product.target} multiplies by it, expected a linear layer",
                SourceLine.read(source_line(product)), WEIGHT_MEANING,
            )


def _operators(program: Program) -> Iterator[Unrecognised]:
    """Calls of other libraries' operators."""
    for node in custom_operators(program):
        yield Unrecognised(
            "operator", module_of(node) or node.name, node.name,
            f"{node.target} is a custom operator, expected torch's own",
            SourceLine.read(source_line(node)), OPERATOR_MEANING,
        )


def _product_behind(weight: Node) -> Node | None:
    frontier = list(weight.users)
    while frontier:
        reader = frontier.pop()
        if reader.target in PRODUCTS:
            return reader
        if reader.target in MOVES:
            frontier.extend(reader.users)
    return None


def _known_linears(program: Program) -> set[str]:
    """The linears of attention, MLPs and the head, also where no transform reaches them."""
    sites = program.sites
    refs = [site.o for site in sites.attention]
    refs += [r for m in sites.mlp for r in (m.up, m.gate, m.down)]
    known = {r.node for r in (*refs, *sites.routers) if r is not None}
    for core in program.call_nodes(ops.attention):
        operands = [x for x in core.args[:3] if isinstance(x, Node)]
        known |= {n.name for n in nearest_linears(*operands, stops=(ops.attention,))}
    (output,) = (n for n in program.graph.nodes if n.op == "output")
    heads = nearest_linears(*output.all_input_nodes, stops=(ops.attention,))
    return known | ({n.name for n in heads} if len(heads) == 1 else set())


def _weight(node: Node) -> str:
    return str(weight_node(node).target)


def _parent(weight: str) -> str:
    """The module that holds the linear layer of a weight."""
    return ".".join(weight.split(".")[:-2]) or weight.removesuffix(".weight")


def _block(weight: str) -> str:
    """The path up to its first number, `model.layers.3`; without one, the linear's parent."""
    parts = weight.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return _parent(weight) if number is None else ".".join(parts[: number + 1])


def _where(source: SourceLine | None) -> str:
    return f" ({source})" if source is not None else ""
