"""find_residual: the stream from the embedding to the head, its norms, writers and readers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fptq_compiler.graph.pipeline import Effect
from fptq_compiler.passes import FIND_SITES
from fptq_compiler.passes.find_residual import FindResidual
from tests.passes.steps import ONE, assert_settled, captured, edited, logits, run
from tests.toys import MAX_POSITIONS, Toy, ToyConfig

READY = FIND_SITES[:-1]


def test_site() -> None:
    program = captured(ONE, *READY)
    result = run(program, FindResidual())
    site = program.sites.residual
    assert site is not None
    assert (site.width, site.table, site.tied) == (24, "model.embed_tokens.weight", False)
    assert site.stream == ("embedding", "add_2", "add_3")
    assert site.norms == ("rms_norm_default", "rms_norm_default_1", "rms_norm_default_2")
    assert [r.node for r in site.readers] == [
        "linear",
        "linear_1",
        "linear_2",  # q, k, v
        "linear_4",
        "linear_5",  # gate, up
        "linear_7",  # head
    ]
    assert [w.weight for w in site.writers] == [
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
    ]
    assert [(b.stream, b.norm, b.writer.node, b.add) for b in site.branches] == [
        ("embedding", "rms_norm_default", "linear_3", "add_2"),
        ("add_2", "rms_norm_default_1", "linear_6", "add_3"),
    ]
    assert site.head.weight == "lm_head.weight"
    assert result.near_misses == ()


def test_site_of_a_tied_model() -> None:
    site = captured(ToyConfig(layers=1, tied=True), *READY, FindResidual()).sites.residual
    assert site is not None
    assert site.tied


def test_numbers() -> None:
    """An analysis runs nothing and moves nothing."""
    assert FindResidual.effect is Effect.ANALYSES
    program = captured(ONE, *READY)
    before = logits(program)
    run(program, FindResidual())
    assert logits(program).equal(before)


class Embedded(nn.Module):
    """The toy's embedding, and something done to it."""

    def __init__(self, table: nn.Embedding, formula: Callable[[Embedded, Tensor], Tensor]) -> None:
        super().__init__()
        self.table, self.formula = table, formula
        self.places = nn.Embedding(MAX_POSITIONS, table.embedding_dim)
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, table.embedding_dim))

    def forward(self, ids: Tensor) -> Tensor:
        return self.formula(self, ids)


def _embedding(formula: Callable[[Embedded, Tensor], Tensor]) -> Callable[[Toy], None]:
    def edit(toy: Toy) -> None:
        toy.model.embed_tokens = Embedded(toy.model.embed_tokens, formula)  # type: ignore[assignment]

    return edit


def test_site_behind_a_scaled_embedding() -> None:
    """Gemma multiplies its embedding by the root of the width: every map commutes with that."""
    edit = _embedding(lambda e, ids: e.table(ids) * 24**0.5)
    site = edited(ONE, edit, *FIND_SITES).sites.residual
    assert site is not None
    assert site.stream[0] == "mul"


class Cumulative(nn.Module):
    """A branch that adds up over the tokens: no linear layer writes to the stream."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y.cumsum(1)


def _add_sum(toy: Toy) -> None:
    toy.model.layers[0].mlp = Cumulative(toy.model.layers[0].mlp)


@pytest.mark.parametrize(
    ("edit", "node", "reason"),
    [
        (
            _embedding(lambda e, ids: e.table(ids) + e.places(torch.arange(ids.shape[1]))),
            "embedding",
            "2 embeddings, expected one",
        ),
        (
            _embedding(lambda e, ids: e.table(ids) * e.gain),
            "mul",
            "mul (aten.mul.Tensor) reads the residual stream",
        ),
        (_add_sum, "cumsum", "cumsum adds to the stream and is not a linear layer"),
    ],
    ids=["positions", "gain", "writer"],
)
def test_near_miss(edit: Callable[[Toy], None], node: str, reason: str) -> None:
    program = edited(ONE, edit, *READY)
    result = run(program, FindResidual())
    assert program.sites.residual is None
    (miss,) = result.near_misses
    assert (miss.what, miss.node, miss.reason) == ("residual", node, reason)
    assert ", line " in miss.source


def test_twice() -> None:
    program = captured(ONE, *READY, FindResidual())
    site = program.sites.residual
    assert_settled(program, FindResidual())
    assert program.sites.residual == site
