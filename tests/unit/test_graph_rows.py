"""Weights a few rows at a time: the same numbers, without the whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from fptq_compiler.graph import evaluate, rows
from fptq_compiler.graph.edges import GainEdge, fold, insert_edge, insert_map
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.rows import Rows
from fptq_compiler.transforms import Hadamard, Port, Side

aten = torch.ops.aten
VOCABULARY, WIDTH = 21, 8


@pytest.fixture(autouse=True)
def _two_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "PIECE", 2 * WIDTH)
    monkeypatch.setattr(evaluate, "PIECE", 2 * WIDTH)


def the_pieces(found: Rows) -> list[int]:
    return [len(piece) for piece in found.pieces()]


@pytest.fixture
def weight(generator: torch.Generator) -> Tensor:
    return torch.randn(VOCABULARY, WIDTH, generator=generator)


def test_rows_come_in_pieces_and_in_order(weight: Tensor) -> None:
    found = Rows(weight, torch.float64)
    assert the_pieces(found) == [2] * 10 + [1]
    assert torch.equal(found.whole(), weight.double())


def test_operators_on_mapped_rows(weight: Tensor, generator: torch.Generator) -> None:
    mapped = weight.double() * 3 + 1
    found = Rows(weight, torch.float64).through(lambda x: x * 3).through(lambda x: x + 1)
    ids = torch.tensor([[3, 20], [0, 3]])
    assert torch.equal(found.embedding(ids), functional.embedding(ids, mapped))
    x = torch.randn(2, 5, WIDTH, generator=generator, dtype=torch.float64)
    bias = torch.randn(VOCABULARY, generator=generator, dtype=torch.float64)
    expected = functional.linear(x, mapped, bias)
    torch.testing.assert_close(found.linear(x, bias), expected, rtol=1e-14, atol=1e-14)


def a_program(table: Tensor, head: Tensor) -> Program:
    """logits = head(table[ids]), and the table's sum, which needs the whole of it."""
    root = nn.Module()
    root.table = nn.Parameter(table, requires_grad=False)
    root.head = nn.Parameter(head, requires_grad=False)
    graph = fx.Graph(root)
    ids = graph.placeholder("ids")
    found = graph.call_function(aten.embedding.default, (graph.get_attr("table"), ids))
    logits = graph.call_function(aten.linear.default, (found, graph.get_attr("head")))
    total = graph.call_function(aten.sum.default, (graph.get_attr("table"),))
    graph.output((logits, total))
    return Program(fx.GraphModule(root, graph), ())


def test_a_graph_takes_them_wherever_it_can(
    weight: Tensor, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = torch.randn(VOCABULARY, WIDTH, generator=generator)
    program = a_program(weight, head)
    insert_map(program, "turn", Hadamard(WIDTH), [
        Port("table", Side.TABLE, False), Port("head", Side.IN, False),
    ])
    insert_edge(program, "edges.gain", "head", GainEdge(torch.arange(1.0, WIDTH + 1)))
    ids = torch.tensor([[1, 5, 20]])
    with torch.no_grad():
        logits, total = evaluate.run(program.module, [ids], dtype=torch.float64)
        monkeypatch.setattr(evaluate, "PIECE", 1 << 30)
        expected, expected_total = evaluate.run(program.module, [ids], dtype=torch.float64)
    torch.testing.assert_close(logits, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(total, expected_total, rtol=1e-13, atol=1e-13)


def test_folding_by_rows_gives_the_folded_whole(
    weight: Tensor, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = torch.randn(VOCABULARY, WIDTH, generator=generator)
    found = []
    for piece in (2 * WIDTH, 1 << 30):
        monkeypatch.setattr(rows, "PIECE", piece)
        program = a_program(weight.clone(), head.clone())
        insert_map(program, "turn", Hadamard(WIDTH), [Port("table", Side.TABLE, False)])
        assert fold(program) == 1
        found.append(program.parameter("table"))
    assert torch.equal(*found)
