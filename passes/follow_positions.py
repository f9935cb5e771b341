"""Let what counts positions from 0, beside RoPE, count as the attention mask does.

Learned positions are rows of a table: those of arange(S), of numbers that come out as that plus a
first row (OPT counts a mask of ones from 2), or a slice of the table.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from fptq_compiler.graph import ops
from fptq_compiler.graph.evaluate import ancestors
from fptq_compiler.graph.probe import Probe
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.surgery import call, replace
from fptq_compiler.passes.attention_masks import SIZE_ONLY
from fptq_compiler.passes.cache_refusal import refuse_cache

aten = torch.ops.aten
INDEX_AT: dict[Any, int] = {aten.embedding.default: 1, ops.embedding: 0}
"""Where an embedding has its rows' numbers, of its first two arguments; the other is its table."""


def learned_positions(program: Program, probe: Probe, ids: Node) -> dict[Node, int]:
    """The embeddings whose rows are the positions, and the row of the first one."""
    found = {}
    for node in program.graph.nodes:
        if node.target not in INDEX_AT:
            continue
        index = node.args[INDEX_AT[node.target]]
        assert isinstance(index, Node)
        behind = set(ancestors(index))
        if ids not in behind or index is ids:
            continue
        if any(r in behind and r.target not in SIZE_ONLY for r in ids.users):
            continue
        rows = probe.region.value(index, {})
        first = int(rows.flatten()[0])
        counted = torch.arange(first, first + rows.shape[-1])
        if bool((rows == counted).all()):
            found[node] = first
    return found


def follow_positions(
    program: Program, ids: Node, positions: Node, learned: dict[Node, int], length: int
) -> None:
    """What still counts positions from 0 counts as the mask does."""
    for node, first in learned.items():
        rows = positions
        if first:
            rows = call(program.graph, node, aten.add.Tensor, (positions, first), like=positions)
        node.update_arg(INDEX_AT[node.target], rows)
        _check_rows(program, node, first + length)
    program.graph.eliminate_dead_code()
    for node in program.call_nodes(aten.slice.Tensor):
        _follow_slice(node, ids, positions)
    for node in list(program.graph.nodes):
        if node.target is not aten.arange.default or node is positions:
            continue
        count = node.args[0]
        if not isinstance(count, Node) or _reads_batch(count, ids):
            continue  # it numbers experts, or the tokens of all rows, as a router does
        if count.args != (ids, 1) or count.target is not aten.sym_size.int:
            refuse_cache(node, "it counts something that is not the positions of the input")
        for row in [r for r in node.users if r.target is aten.unsqueeze.default]:
            if row.args[1] == 0:  # (1, S), a row for all of the batch, becomes (B, S)
                replace(row, positions)
        if node.users:
            replace(node, positions)
    for reader in positions.users:
        if reader.target in INDEX_AT:
            _check_rows(program, reader, length)


def _follow_slice(node: Node, ids: Node, positions: Node) -> None:
    """The first rows of a table, as many as tokens, become the rows of the positions."""
    table, *limits = node.args
    assert isinstance(table, Node)
    if table.op != "get_attr" or len(limits) != 3 or limits[0] or limits[1]:
        return
    stop = limits[2]
    if not isinstance(stop, Node) or stop.target is not aten.sym_size.int or stop.args != (ids, 1):
        return
    rows = call(node.graph, node, aten.embedding.default, (table, positions), like=node)
    for reader in [r for r in node.users if r.target is aten.unsqueeze.default]:
        if reader.args[1] == 0:  # (1, S, d), a table for all of the batch, becomes (B, S, d)
            replace(reader, rows)
    replace(node, rows)


def _reads_batch(count: Node, ids: Node) -> bool:
    return any(
        n.target is aten.sym_size.int and n.args == (ids, 0) for n in ancestors(count)
    )


def _check_rows(program: Program, embedding: Node, needed: int) -> None:
    table = embedding.args[1 - INDEX_AT[embedding.target]]
    assert isinstance(table, Node)
    rows = program.held(str(table.target)).shape[0]
    if rows < needed:
        refuse_cache(embedding, f"its table has {rows} positions; give --max-length {rows}")
