"""commutes: what mapping a node's inputs does to its output, found by running it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from fptq_compiler.graph.commutes import (
    Answer,
    ChannelMap,
    Commutes,
    gain_and_bias,
    reflection,
)
from tests.passes.steps import exported_module

WIDTH = 6
Formula = Callable[[Tensor, Tensor], Tensor]


class Masked(nn.Module):
    """An embedding where a mask of the ids shows it."""

    def __init__(self, kind: torch.dtype) -> None:
        super().__init__()
        self.table, self.kind = nn.Embedding(10, WIDTH), kind

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids) * (ids != 0).unsqueeze(-1).to(self.kind)


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32])
def test_a_mask_is_no_zero(kind: torch.dtype) -> None:
    """What may hide a value must not be taken for what always does."""
    program = exported_module(Masked(kind), torch.zeros(2, 7, dtype=torch.long))
    (output,) = (n for n in program.graph.nodes if n.op == "output")
    product = output.args[0][0]
    assert isinstance(product, Node)
    commutes = Commutes(program.module)
    (embedding,) = program.call_nodes(torch.ops.aten.embedding.default)
    assert commutes.ask(product, [embedding], reflection(WIDTH)) is Answer.MAPPED
    assert not commutes.is_zero(product)


class Between(nn.Module):
    """Two embeddings, and a formula of them."""

    def __init__(self, formula: Formula) -> None:
        super().__init__()
        self.first, self.second = nn.Embedding(10, WIDTH), nn.Embedding(10, WIDTH)
        self.formula = formula

    def forward(self, ids: Tensor) -> Tensor:
        return self.formula(self.first(ids), self.second(ids))


def ask(formula: Formula, change: ChannelMap, *, both: bool = False) -> Answer:
    """Ask the last node of a formula of one operator, its first input mapped, or both."""
    program = exported_module(Between(formula), torch.zeros(2, 7, dtype=torch.long))
    embeddings = program.call_nodes(torch.ops.aten.embedding.default)
    (output,) = (n for n in program.graph.nodes if n.op == "output")
    node = output.args[0][0]  # type: ignore[index]
    assert isinstance(node, Node)
    return Commutes(program.module).ask(node, embeddings if both else embeddings[:1], change)


@pytest.mark.parametrize(
    ("formula", "both", "expected"),
    [
        (lambda x, y: x + y, True, Answer.MAPPED),
        (lambda x, y: x + y, False, Answer.OTHER),
        (lambda x, y: x * 3.0, False, Answer.MAPPED),
        (lambda x, y: x * y, True, Answer.OTHER),
        (lambda x, y: x.cumsum(1), False, Answer.MAPPED),
        (lambda x, y: x.cumsum(-1), False, Answer.OTHER),
        (lambda x, y: x.roll(1, -1), False, Answer.OTHER),
        (lambda x, y: x.flip(1), False, Answer.MAPPED),
        (lambda x, y: x.narrow(-1, 0, 3), False, Answer.OTHER),
        (lambda x, y: x.tanh(), False, Answer.OTHER),
        (lambda x, y: torch.linalg.vector_norm(x, dim=-1, keepdim=True), False, Answer.SAME),
    ],
)
def test_an_orthogonal_map(formula: Formula, both: bool, expected: Answer) -> None:
    assert ask(formula, reflection(WIDTH), both=both) is expected


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        (lambda x, y: x.reshape(-1, WIDTH), Answer.MAPPED),
        (lambda x, y: x.transpose(0, 1), Answer.MAPPED),
        (lambda x, y: x * 3.0, Answer.OTHER),
        (lambda x, y: x.flip(-1), Answer.OTHER),
    ],
)
def test_a_gain_and_a_bias(formula: Formula, expected: Answer) -> None:
    """They commute with moves of tokens alone."""
    assert ask(formula, gain_and_bias(WIDTH)) is expected


def test_a_reflection_is_orthogonal_and_moves_every_channel() -> None:
    matrix = reflection(WIDTH)(torch.eye(WIDTH, dtype=torch.float64))
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(WIDTH, dtype=torch.float64))
    assert float(matrix.fill_diagonal_(1.0).abs().min()) > 1e-3
