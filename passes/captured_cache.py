"""The KV cache that a model was captured with: where its past comes in and where it goes out.

Two kinds are known, both float, with one axis along which tokens lie:

    growing   an input (B, H, P, D), `cat([past, new], axis)`, and that as an output
    static    a buffer (B, H, L, D), written at positions by `index_copy` or `index_put`, and
              written back with `copy_`

transformers names them DynamicCache and StaticCache; nothing here depends on names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor
from torch.fx import Node

from fptq_compiler.errors import UnsupportedModelError
from fptq_compiler.graph.program import Program, source_line
from fptq_compiler.passes.canonicalize import CASTS, COPIES
from fptq_compiler.passes.plain_inputs import is_mask, is_positions

aten = torch.ops.aten
COPY_BACK = aten.copy_.default
PASSING = (*COPIES, *CASTS)


@dataclass(frozen=True)
class Slot:
    """One tensor of a captured cache.

    Attributes:
        past: the input, or the `get_attr` of the buffer.
        joined: what attention reads: past tokens and new ones.
        new: the new ones alone.
        axis: along which tokens lie.
        length: how many tokens a static cache holds; None where it grows.
    """

    past: Node
    joined: Node
    new: Node
    axis: int
    length: int | None


def find_slots(program: Program) -> list[Slot]:
    """All tensors of the cache, in the order of the graph; none where there is no cache.

    Raises:
        UnsupportedModelError: an input that is no part of a cache that is understood.
    """
    slots = []
    ids = program.node(program.inputs[program.ids_index].name)
    for node in program.graph.nodes:
        if node.op != "placeholder" or node is ids or not node.users:
            continue
        if not is_mask(node) and not is_positions(node) and _is_cache_like(node):
            slots.append(_growing(node))
    for write in program.call_nodes(COPY_BACK):
        buffer, value = write.args[:2]
        if isinstance(buffer, Node) and buffer.op == "get_attr" and _is_cache_like(buffer):
            slots.append(_static(buffer, value))
    return slots


def outputs_of(program: Program) -> list[Node]:
    """What the graph gives, the logits first."""
    (output,) = (n for n in program.graph.nodes if n.op == "output")
    found = output.args[0]
    values = found if isinstance(found, (tuple, list)) else (found,)
    return [x for x in values if isinstance(x, Node)]


def behind_copies(node: Node) -> Node:
    """The value that `node` merely copies or casts."""
    while node.target in PASSING and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def parts_of(cat: Node) -> list[Node]:
    """What a `cat` joins, without the literal empty tensors that transformers begins with."""
    tensors = cat.args[0]
    assert isinstance(tensors, (tuple, list))
    return [x for x in tensors if isinstance(x, Node) and x.meta["val"].dim() > 1]


def is_size(node: Node) -> bool:
    """Whether the node reads a size only."""
    return node.target is aten.sym_size.int


def refuse(node: Node, reason: str) -> NoReturn:
    """Raise: the cache at `node` cannot be taken out."""
    source = source_line(node)
    message = (
        f"the model was captured with a KV cache that cannot be taken out again: {node.name} "
        f"{reason}{f' ({source})' if source else ''}. Export the model without a cache "
        "(use_cache=False); --kv-cache gives it one."
    )
    raise UnsupportedModelError(message)


def _is_cache_like(node: Node) -> bool:
    """A tensor with heads, tokens and channels; smaller ones are counters."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() >= 3


def _growing(past: Node) -> Slot:
    joined = _join(past)
    if joined.target is not aten.cat.default:
        refuse(joined, f"writes into the input {past.name}, expected cat([past, new])")
    first, *rest = parts_of(joined)
    if len(rest) != 1 or behind_pass(first) is not past:
        refuse(joined, f"joins {len(rest) + 1} tensors, expected the past and then the new tokens")
    axis = joined.args[1] if len(joined.args) > 1 else 0
    assert isinstance(axis, int)
    rank = joined.meta["val"].dim()
    return Slot(past, joined, rest[0], axis % rank, None)


def _static(buffer: Node, value: object) -> Slot:
    joined = _join(buffer)
    if value is not joined:
        refuse(joined, f"is not what {buffer.name} keeps for the next run, expected it to be")
    match joined.target, joined.args:
        case aten.index_copy.default, (_, int() as axis, Node(), Node() as new):
            pass
        case aten.index_put.default, (_, (list() | tuple()) as index, Node() as new, *_):
            axis = len(index) - 1
            if any(x is not None for x in index[:-1]) or joined.args[3:] not in ((), (False,)):
                refuse(joined, "writes by more than the token's position")
        case _:
            refuse(joined, f"is {joined.target}, expected index_copy or index_put at positions")
    rank = buffer.meta["val"].dim()
    if new.target is aten.view.default and new.meta["val"].dim() < rank:
        new = new.all_input_nodes[0]  # assigned to `cache[:, :, positions]`, without the batch
    if new.meta["val"].dim() != rank:
        refuse(joined, f"writes {list(new.meta['val'].shape)}, expected {rank} axes")
    return Slot(buffer, joined, new, axis % rank, int(buffer.meta["val"].shape[axis]))


def behind_pass(node: Node) -> Node:
    """Behind copies, and behind a `cat` with nothing else in it."""
    node = behind_copies(node)
    while node.target is aten.cat.default and len(parts_of(node)) == 1:
        node = behind_copies(parts_of(node)[0])
    return node


def _join(past: Node) -> Node:
    """The one node that reads the past, behind what passes it on."""
    if not past.meta["val"].is_floating_point():
        refuse(past, f"holds {past.meta['val'].dtype}: a quantised cache, expected float")
    joins = [n for n in _readers(past) if not is_size(n) and n.target is not COPY_BACK]
    if len(joins) != 1:
        names = ", ".join(n.name for n in joins) or "nothing"
        refuse(past, f"is read by {names}, expected one node that joins past and new tokens")
    return joins[0]


def _readers(past: Node) -> list[Node]:
    found = []
    for reader in past.users:
        alone = reader.target is aten.cat.default and len(parts_of(reader)) == 1
        if reader.target in PASSING or alone:
            found += _readers(reader)
        else:
            found.append(reader)
    return found
